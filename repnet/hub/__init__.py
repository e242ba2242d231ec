"""Verified artefacts on the Hugging Face Hub, or in a folder that stands in for it."""

from repnet.hub.card import LICENSES, write_model_card
from repnet.hub.transfer import from_hub, pull, push_to_hub

__all__ = ["LICENSES", "from_hub", "pull", "push_to_hub", "write_model_card"]
