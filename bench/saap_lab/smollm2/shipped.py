"""Where the routers lie that come with the package. Imports nothing, for whoever only asks for the folder."""

from pathlib import Path

SHIPPED = Path(__file__).parent / "SmolLM2-135M-Instruct-routers"
"""Those of `model.NAME`, made by ``python -m saap_lab.smollm2.routers``."""
