"""Settings of the executor service."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import ByteSize, Field

from diptych.service.settings import ServiceSettings

if TYPE_CHECKING:  # imports transformers, for which `--help` need not wait
    from executor_service.engine.messages import EngineConfig


class ExecutorSettings(ServiceSettings):
    """Every flag of `diptych executor`."""

    default_port: ClassVar[int] = 50052

    port: int = Field(50052, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the model runs")
    dtype: Literal["auto", "float16", "bfloat16", "float32", "float64"] = Field(
        "auto", description="of weights and activations; auto: float32 on CPU, the checkpoint's own on a GPU"
    )
    decoder: Literal["auto", "fused", "stock"] = Field(
        "auto", description="fused: our own loop over the language model's layers, for the shapes it knows; "
        "stock: transformers'; auto: fused where possible",
    )  # fmt: skip
    max_model_len: int | None = Field(None, ge=2, description="prompt and output tokens of one request; model's own")
    max_num_seqs: int | None = Field(
        None, ge=1, le=4096, description="requests in one batch; 64 on CPU, 256 on a GPU if not given"
    )
    max_num_batched_tokens: int | None = Field(
        None, ge=1, description="tokens in one engine step; 2048 on CPU, 8192 on a GPU if not given"
    )
    block_size: int = Field(16, ge=1, le=256, description="tokens in one KV cache block")
    gpu_memory_utilization: float = Field(
        0.9, gt=0, le=1, description="share of the GPU's memory the executor may use in all"
    )
    kv_cache_memory: ByteSize | None = Field(
        None, gt=0, description="bytes of the KV cache, e.g. 512MiB; on CPU at most 1 GiB if not given"
    )
    cuda_graphs: bool = Field(True, description="replay steps that only decode as CUDA graphs; without effect on CPU")
    async_scheduling: Literal["auto", "on", "off"] = Field(
        "auto", description="prepare a step while the device runs the one before; auto: on a GPU"
    )
    prefix_caching: bool = Field(True, description="share the KV cache of equal beginnings between requests")
    encoder_cache_memory: ByteSize | None = Field(
        None, gt=0, description="bytes of encoder features kept for items seen before; default: two steps' items, "
        "on CPU at least 256 MiB",
    )  # fmt: skip
    media_memory: ByteSize = Field(
        ByteSize(512 * 1024 * 1024),
        gt=0,
        description="shared memory for item tensors: of live requests, and kept for items seen before",
    )
    max_requests: int = Field(1024, ge=1, description="live requests; more are refused with RESOURCE_EXHAUSTED")
    receive_timeout: float = Field(
        30.0,
        gt=0,
        description="seconds a sender may be silent that was asked for tensors, before its request "
        "ends; four times as long for a mebibyte",
    )
    num_threads: int | None = Field(None, ge=1, description="CPU threads of the model; default: torch's own choice")
    check_integrity: bool = Field(False, description="prove blocks and queues after every step (slow; for tests)")

    @property
    def engine_config(self) -> EngineConfig:
        """What the engine process is told."""
        from executor_service.engine.messages import EngineConfig

        return EngineConfig(
            model_dir=self.model.resolve(),
            plugins=self.plugin,
            limits=self.limits,
            device=self.device,
            dtype=self.dtype,
            decoder=self.decoder,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            block_size=self.block_size,
            gpu_memory_utilization=self.gpu_memory_utilization,
            kv_cache_memory=None if self.kv_cache_memory is None else int(self.kv_cache_memory),
            num_threads=self.num_threads or _threads_by_environment(),
            prefix_caching=self.prefix_caching,
            cuda_graphs=self.cuda_graphs,
            async_scheduling=self.async_scheduling,
            encoder_cache_memory=None if self.encoder_cache_memory is None else int(self.encoder_cache_memory),
            check_integrity=self.check_integrity,
        )


def _threads_by_environment() -> int | None:
    """OMP_NUM_THREADS, which torch reads itself only in some builds."""
    text = os.environ.get("OMP_NUM_THREADS", "")
    return int(text) if text.isdigit() and int(text) else None
