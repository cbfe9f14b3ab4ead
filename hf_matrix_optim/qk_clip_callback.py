"""A default callback of every Trainer that does what ``--optim_args qk_clip=...`` asks for."""

from typing import TYPE_CHECKING, Any

from transformers.trainer_callback import TrainerCallback

from hf_matrix_optim.registration import options_asked_for
from hf_matrix_optim.tripwire import innermost_optimizer

if TYPE_CHECKING:
    from hf_matrix_optim.qk_clip import QKClip


class QKClipCallback(TrainerCallback):
    """Attaches a ``QKClip`` to model and optimizer for a training, and logs what it did.

    Each entry with a ``learning_rate`` gets ``qk_clip/max_logit``, the largest attention logit since the last one
    (before clipping), and ``qk_clip/clipped_heads``, how many times a head was clipped since then; so does the summary
    at the end of training, if there were steps after the last entry.
    """

    def __init__(self) -> None:
        self._clip: QKClip | None = None
        self._is_own = False

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        self._detach()  # of a training that ended by an exception
        found = innermost_optimizer(optimizer)
        options = options_asked_for(args, found)
        if options is None or options.qk_clip is None:
            return
        self._clip = getattr(found, "qk_clip", None)  # create_optimizer has attached it
        if self._clip is None:
            self._refuse_arguments(args)
            from hf_matrix_optim.qk_clip import QKClip  # imported late: it takes transformers' models with it

            self._clip = QKClip(model, options.qk_clip).attach(found)
            self._is_own = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._detach()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        is_summary = logs is not None and "train_runtime" in logs
        if self._clip is None or logs is None or not ("learning_rate" in logs or is_summary):
            return
        report = self._clip.drain()
        if is_summary and "qk_clip/max_logit" not in report:
            return
        logs.update(report)
        if state.log_history:
            state.log_history[-1].update(report)

    @staticmethod
    def _refuse_arguments(args: Any) -> None:
        """Raise NotImplementedError for ways to spread a model over GPUs in which this process has not all heads."""
        if getattr(args, "n_gpu", 1) > 1:
            raise NotImplementedError(
                f"qk_clip does not run under DataParallel, which Trainer uses for {args.n_gpu} GPUs of one process: "
                "start one process a GPU with torchrun, or set CUDA_VISIBLE_DEVICES to one, or leave qk_clip out"
            )
        parallelism = getattr(args, "parallelism_config", None)
        for size in ("tp_size", "cp_size", "sp_size"):
            if (getattr(parallelism, size, None) or 1) > 1:
                raise NotImplementedError(
                    f"qk_clip does not run with {size}={getattr(parallelism, size)}, where ranks attend to parts of "
                    "heads or sequences: use FSDP2 or DDP, or leave qk_clip out"
                )

    def _detach(self) -> None:
        if self._clip is not None and self._is_own:
            self._clip.detach()
        self._clip, self._is_own = None, False
