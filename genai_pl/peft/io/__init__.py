"""Adapter folders in PEFT's layout, written and read."""
