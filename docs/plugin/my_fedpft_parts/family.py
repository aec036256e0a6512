"""CamemBERT, which is RoBERTa under another name in the library's configurations."""

from __future__ import annotations

from dataclasses import replace

from fedpft_core.model.families import FAMILIES

FAMILY = replace(FAMILIES["roberta"], model_type="camembert")
