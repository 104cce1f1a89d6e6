"""A policy for each layer of one model, as `python -m sglang_misa.calibrate` writes it and `--misa-policy` reads it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from sglang_misa.policy import PHASES, Phase, SelectionPolicy
from sglang_misa.validation import ConfigError, parsed, plain, read_text, short, validated

# What shapes the indexer and what it reads. Weights are not among it: a fine-tuned model has its base's fingerprint.
_SHAPE = (
    *("architectures", "num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "q_lora_rank"),
    *("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "intermediate_size"),
    *("index_n_heads", "index_head_dim", "index_topk"),
)
_SIZES = {"layers": "num_hidden_layers", "index_heads": "index_n_heads", "index_topk": "index_topk"}
MAX_LAYERS = 4096  # of a model; a wrong number would be counted through
_TEXT = "."  # a pattern: a character or more, and no half of one, which could not travel as UTF-8
_CALIBRATE = "calibrate on this model (python -m sglang_misa.calibrate), or drop --misa-policy"


class ModelIdentity(BaseModel):
    """What a policy file and a dump say of the model they were made with."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())

    architecture: str = Field(pattern=_TEXT)
    layers: int = Field(ge=1, le=MAX_LAYERS)
    index_heads: int = Field(ge=1)
    index_topk: int = Field(ge=1)
    config_sha256: str = Field(pattern="^[0-9a-f]{64}$", description="of the sizes in config.json, not of weights")

    @classmethod
    def of(cls, model: Any) -> ModelIdentity:
        """The identity of a Hugging Face config, or of any object with its attributes.

        Raises ConfigError for one without the sizes, or with impossible ones.
        """
        shape: dict[str, Any] = {name: getattr(model, name, None) for name in _SHAPE}
        found = {
            "architecture": (shape["architectures"] or ["unknown"])[0],
            "config_sha256": hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest(),
            **{ours: shape[theirs] for ours, theirs in _SIZES.items()},
        }
        names = {ours: f"config.json: {theirs}" for ours, theirs in _SIZES.items()}
        return validated(cls, found, "config.json", names)


class Recall(BaseModel):
    """Recall of a layer's policy on the rows that chose it and on rows held out, and its cost over stock's."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    calibrated: float = Field(ge=0, le=1)
    held_out: float | None = Field(None, ge=0, le=1)
    cost: float = Field(ge=0, allow_inf_nan=False, description="of the layer's indexer, over stock's")


class LayerPolicy(BaseModel):
    """The policies of one layer, and what was measured of them: nothing where a policy is stock DSA."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    prefill: SelectionPolicy = SelectionPolicy()
    decode: SelectionPolicy = SelectionPolicy()
    recall: Mapping[Phase, Recall] = {}

    def policy(self, phase: Phase) -> SelectionPolicy:
        return self.prefill if phase == "prefill" else self.decode


class PolicyFile(BaseModel):
    """Policies of every layer of `model`; `layers` by number, in words as JSON has them."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())

    model: ModelIdentity
    created_by: str = Field(pattern=_TEXT)
    target_recall: float = Field(ge=0, le=1)
    length: int = Field(ge=1, description="keys that a row saw, at most, where recall was measured")
    layers: Mapping[str, LayerPolicy]

    @field_validator("layers")
    @classmethod
    def _every_layer(cls, layers: Mapping[str, LayerPolicy], info: Any) -> Mapping[str, LayerPolicy]:
        model = info.data.get("model")
        if model is None:  # has a sentence of its own
            return layers
        wanted = {str(layer) for layer in range(model.layers)}
        for kind, names in (("none for", wanted - layers.keys()), ("others,", layers.keys() - wanted)):
            if names:
                listed = ", ".join(sorted(names, key=lambda name: (len(name), name)))
                raise ValueError(
                    f"expected policies for layers 0 to {model.layers - 1}, got {kind} {plain(listed)}; add or drop "
                    "them"
                )
        return layers

    @classmethod
    def read(cls, path: str) -> PolicyFile:
        """The file at `path`. Raises ConfigError where it is none."""
        source = f"--misa-policy {path}"
        found = parsed(read_text("--misa-policy", path), source)
        if isinstance(found, dict) and "model" not in found and found.keys() & {*PHASES}:
            raise ConfigError([f"{source}: expected a policy file, got a configuration; give it with --misa-config"])
        return validated(cls, found, source)

    @classmethod
    def is_meant(cls, found: Any) -> bool:
        """Whether `found` (parsed JSON) is such a file, whatever its mistakes, and no configuration."""
        return isinstance(found, dict) and {"model", "layers"} <= found.keys()

    def policies(self, phase: Phase) -> tuple[SelectionPolicy, ...]:
        """The policy of each layer, in order."""
        return tuple(self.layers[str(layer)].policy(phase) for layer in range(self.model.layers))

    def problems(self) -> Iterator[str]:
        """Sentences for policies that are impossible, alone or beside each other."""
        for phase in PHASES:
            for layer, policy in enumerate(self.policies(phase)):
                model = {"index_heads": self.model.index_heads, "topk": self.model.index_topk}
                yield from (f"layer {layer}: {problem}" for problem in policy.problems(phase, **model))
        active = [policy for policy in self.policies("decode") if policy.active]
        for name, why in (
            ("min_len", "the length gate is the step's, one for all layers"),
            ("min_rows", "the gate of rows is the step's, too"),
            ("min_tokens", "the gate of tokens is the step's, too"),
            ("sketch", "pages of all layers have sketches of one width"),
        ):
            found = sorted({getattr(policy, name) or 0 for policy in active})
            found = [value for value in found if value or name != "sketch"]  # a layer may do without
            if len(found) > 1:
                listed = ", ".join(map(str, found))
                yield f"decode.{name}: expected one value in every layer, as {why}, got {listed}; make them equal"

    def model_problems(self, model: Any) -> Iterator[str]:
        """Sentences for what `model` (a Hugging Face config) has other than the model that was calibrated."""
        ours, theirs = self.model.model_dump(), ModelIdentity.of(model).model_dump()
        different = [name for name in ours if ours[name] != theirs[name]]
        for name in [name for name in different if name != "config_sha256"] or different:
            expected = f"--misa-policy: expected a file of a model with {name}={short(theirs[name])}"
            yield f"{expected}, got {short(ours[name])}; {_CALIBRATE}"
