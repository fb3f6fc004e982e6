"""`safevlm serve`: loads the model, puts it under the operator's policy, and serves it until stopped."""

from safevlm.trainer.loading import load_checkpoint

from .answering import Answering
from .routes import build_app
from .serve_options import ServeOptions
from .server import Server


def serve(name: str, options: ServeOptions):
    """
    Args:
        name (`str`): Folder or Hub id of a SafeVLM, or `ID@REVISION`. Clients see the model under this name.
        options (`ServeOptions`)
    """
    checkpoint, _, revision = name.partition("@")
    model, processor = load_checkpoint(
        checkpoint, options.device, options.dtype, revision or None, options.quantization
    )
    if options.policy is not None:
        model.set_safety_policy(model.resolve_policy(options.policy), processor)
    app = build_app(Answering(model, processor, options.limits.max_pixels), name, options.limits)
    Server(app, options.host, options.port, options.limits.request_timeout, f"Serving {name}").run()
