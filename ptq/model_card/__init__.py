"""The model card: ``README.md`` beside the weights, for people and for the hub."""

from ptq.model_card.card import CARD_NAME, card_is_ours, render_card
from ptq.model_card.command import public_source
from ptq.model_card.scores import ScoreRow, insert_scores

__all__ = ["CARD_NAME", "ScoreRow", "card_is_ours", "insert_scores", "public_source", "render_card"]
