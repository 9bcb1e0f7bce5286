"""Reports: runs on disk as one HTML file each, without scripts, fonts or pictures from elsewhere."""
