"""`safevlm serve`: a model behind OpenAI's chat protocol, with the verdict in each reply."""

from contextlib import suppress
from dataclasses import fields

from safevlm.trainer.serving.limits import ServerLimits

from .common import add_command, check_device, check_model_type, check_policy


def add(commands):
    command = add_command(
        commands,
        "serve",
        run,
        "Serve a model under its policy with OpenAI's chat protocol; each reply carries the verdict as `safety`.",
        example="safevlm serve demo/model --policy strict --port 8000",
    )
    command.add_argument("model", help="folder or Hub id of a SafeVLM; ID@REVISION for a commit, branch or tag")
    command.add_argument("--policy", help="default, paper, strict, off, or a policy file (default: the model's own)")
    command.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    command.add_argument("--port", type=int, default=8000, help="port to listen on (default: %(default)s)")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: %(default)s)")
    command.add_argument("--dtype", default="auto", help="float32, bfloat16, ... (default: as saved)")
    command.add_argument("--quantization", choices=("bnb-4bit", "bnb-8bit"), help="load the weights in 4 or 8 bit")
    command.add_argument(
        "--max-request-mb",
        type=float,
        default=ServerLimits.max_request_mb,
        help="largest request, images included (default: %(default)s)",
    )
    command.add_argument(
        "--max-megapixels",
        type=float,
        default=ServerLimits.max_megapixels,
        help="most pixels in all images of a request together, in millions (default: %(default)s)",
    )
    command.add_argument(
        "--request-timeout",
        type=float,
        default=ServerLimits.request_timeout,
        metavar="SECONDS",
        help="time limit of a request, including its wait in the queue; a longer answer is cut off "
        "(default: %(default)s)",
    )
    command.add_argument(
        "--max-waiting",
        type=int,
        default=ServerLimits.max_waiting,
        help="requests that can wait in the queue; further ones get a 503 (default: %(default)s)",
    )


def run(args):
    check_policy(args.policy)
    model_name, _, revision = args.model.partition("@")
    check_model_type(model_name, "MODEL", revision or None)
    from transformers.utils.import_utils import is_serve_available
    from transformers.utils.logging import disable_progress_bar

    if not is_serve_available():
        raise ImportError(
            "The server needs fastapi, uvicorn and openai. Install them with: pip install 'safevlm[serve]'"
        )
    from safevlm.trainer.loading import load_checkpoint
    from safevlm.trainer.serving.answering import Answering
    from safevlm.trainer.serving.routes import build_app
    from safevlm.trainer.serving.server import Server

    limits = ServerLimits(**{field.name: getattr(args, field.name) for field in fields(ServerLimits)})
    if not 0 <= args.port < 2**16:
        raise ValueError(f"--port must be a number from 0 to 65535, got {args.port}.")
    check_device(None if args.device == "auto" else args.device)
    disable_progress_bar()
    model, processor = load_checkpoint(model_name, args.device, args.dtype, revision or None, args.quantization)
    if args.policy is not None:
        model.set_safety_policy(model.resolve_policy(args.policy), processor)
    app = build_app(Answering(model, processor, limits.max_pixels), args.model, limits)
    with suppress(KeyboardInterrupt):
        Server(app, args.host, args.port, limits.request_timeout, f"Serving {args.model}").run()
