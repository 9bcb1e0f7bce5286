"""How a run is spread over processes: sharded, divided by heads, started and ended together."""

from genai_pl.strategies.deepspeed import deepspeed
from genai_pl.strategies.launcher import RankLauncher, follow_launcher, launched
from genai_pl.strategies.pieces import gather
from genai_pl.strategies.recompute import recompute
from genai_pl.strategies.sharded import ShardedStrategy

__all__ = ["RankLauncher", "ShardedStrategy", "deepspeed", "follow_launcher", "gather", "launched", "recompute"]
