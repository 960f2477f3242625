"""Loads one rank's share of the model, and of its MTP layer where drafts come from it."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from minidcp.attention import AttentionBackend
from minidcp.model_config import ModelConfig
from minidcp.models.checkpoint import CheckpointSource
from minidcp.models.deepseek import DeepseekForCausalLM
from minidcp.models.mtp import PredictionLayer, build_prediction_layer
from minidcp.models.weights import RandomSource, RecordingSource, Weights, WeightSource
from minidcp.parallel.state import ParallelState
from minidcp.resolve import ResolvedConfig

Models = tuple[DeepseekForCausalLM, PredictionLayer | None]


class ModelLoader:
    """Raises ValueError if the checkpoint does not fit its config.json.

    Attributes:
        model_config: as it was given; once loaded, what the checkpoint shows to be right.
        bytes_read: of weights.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        model_config: ModelConfig,
        state: ParallelState,
        device: torch.device,
        attention: AttentionBackend,
        log: Callable[..., None],
    ) -> None:
        self.config = config
        self.model_config = model_config
        self.state = state
        self.device = device
        self.attention = attention
        self.log = log
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        self.bytes_read = 0

    def load(self) -> Models:
        fp8 = self.config.quantization == "fp8"
        if self.config.load_format == "dummy":
            random = RandomSource(self.dtype, self.device, fp8)
            models = self.build(random)
            self.bytes_read = random.bytes_read
            return models

        source = CheckpointSource(
            Path(self.config.model),
            self.dtype,
            self.device,
            progress=self.state.tp.rank == 0,
            fp8_block=self.model_config.fp8_block,
            fp8=fp8,
        )
        if self.model_config.tie_word_embeddings and not source.tie_head():
            self.model_config = replace(self.model_config, tie_word_embeddings=False)
            self.log(
                "config.json ties lm_head to the embeddings, but the checkpoint's lm_head.weight "
                "differs from them: it is used, as in transformers",
                logging.WARNING,
            )
        self.choose_prediction_layers(source)

        wanted = RecordingSource(fp8)
        self.build(wanted)
        source.check(wanted.shapes)
        models = self.build(source)
        source.close()
        self.bytes_read = source.bytes_read
        if source.quantized:
            text = f"quantised {len(source.quantized)} matrices to FP8"
            if self.model_config.fp8_block is None:
                self.log(text)
            else:
                self.log(f"{text} that the checkpoint keeps in more bits", logging.WARNING)
        return models

    def choose_prediction_layers(self, source: CheckpointSource) -> None:
        """Leave out the layers that predict further tokens, but for the first one if it is used."""
        first = self.model_config.num_hidden_layers
        end = first + self.model_config.num_nextn_predict_layers
        if self.config.predicts:
            for name in source.share_tensors(first):
                self.log(
                    f"model.layers.{first}.{name} differs from the model's own, which is used in "
                    "its place: more drafts may be wrong",
                    logging.WARNING,
                )
            first += 1
        num_skipped = source.skip_layers(range(first, end))
        if num_skipped > 0:
            self.log(
                f"left out {num_skipped} tensors from model.layers.{first} on: they predict "
                "further tokens, which --speculative-method mtp does with the first such layer"
            )

    def build(self, source: WeightSource) -> Models:
        parts = (self.model_config, self.config, self.state, self.attention, Weights(source))
        model = DeepseekForCausalLM(*parts)
        return model, build_prediction_layer(*parts, model)
