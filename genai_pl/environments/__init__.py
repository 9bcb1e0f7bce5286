"""Environments: what a policy acts in while it learns, turn by turn; `objective.environment=` names one."""

from genai_pl.environments.environment import Environment, Messages, Observation

__all__ = ["SHIPPED", "Environment", "Messages", "Observation"]

# short names of environments that come with the package
SHIPPED = {
    "calculator": "genai_pl.environments.calculator:Calculator",
    "guess_number": "genai_pl.environments.guess_number:GuessNumber",
    "openenv": "genai_pl.environments.openenv:OpenEnv",
}
