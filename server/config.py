"""The server's settings: frozen, each room takes only its slice."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from ..model.config import ModelConfig
from ..scheduler.config import CacheConfig, SchedulerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What the engine process is started with; crosses to it once, as JSON."""

    model: ModelConfig
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)

    def to_json(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def from_json(cls, data: bytes) -> EngineConfig:
        return msgspec.json.decode(data, type=cls)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """What the HTTP process needs to know."""

    engine: EngineConfig
    served_model_names: tuple[str, ...]
    """The first is the one that responses bear; requests may use any."""
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    allow_anonymous: bool = False
    """Serve on a non-loopback address without a key."""
    metrics_prefix: str = "octavo:"
    max_body_bytes: int = 8 * 1024 * 1024
    shutdown_timeout_s: float = 30.0
    """How long open requests may run on after SIGTERM."""
    engine_stall_timeout_s: float = 60.0
    """/ready turns 503 when a busy engine has sent nothing for this long."""
    max_engine_restarts: int = 3
    """In a row, without a request served between; then the server exits."""
    use_generation_config: bool = True
    """Take sampling defaults from the model's generation_config.json."""
    log_level: str = "info"
