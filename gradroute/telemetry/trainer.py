"""A callback for transformers' Trainer that measures its steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import TrainerCallback, TrainerState

    from .monitor import Telemetry
    from .report import Writer


def trainer_callback(telemetry: Telemetry, writer: Writer | None) -> TrainerCallback:
    """See `gradroute.telemetry.Telemetry.callback`."""
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        raise ImportError(
            "callback: got no package transformers, expected it installed: pip install 'gradroute[models]'"
        ) from error

    class TelemetryCallback(TrainerCallback):
        def on_step_begin(self, *_: object, **__: object) -> None:
            telemetry._stop()  # Trainer may have left a step without its end
            telemetry._begin()

        def on_pre_optimizer_step(self, *_: object, **__: object) -> None:
            telemetry.before_update()

        def on_optimizer_step(self, *_: object, **__: object) -> None:
            telemetry.after_update()

        def on_step_end(self, args: object, state: TrainerState, control: object, **_: object) -> None:
            telemetry._finish()
            telemetry._stop()
            if writer is not None:
                telemetry.log_to(writer, state.global_step)

        def on_train_end(self, *_: object, **__: object) -> None:
            telemetry._stop()

    return TelemetryCallback()
