"""`safevlm serve`: a model behind OpenAI's chat protocol, each answer with its verdict."""

from contextlib import suppress

from .common import add_command, check_device, check_model_type, check_policy


def add(commands):
    command = add_command(
        commands,
        "serve",
        run,
        "Serve a model under its policy with OpenAI's chat protocol; replies have the verdict as `safety`.",
        example="safevlm serve demo/model --policy strict --port 8000",
    )
    command.add_argument("model", help="folder or Hub id of a SafeVLM, ID@REVISION for a commit, branch or tag")
    command.add_argument("--policy", help="default, paper, strict, off, or a policy file (default: the model's own)")
    command.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    command.add_argument("--port", type=int, default=8000, help="port to listen on (default: %(default)s)")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: %(default)s)")
    command.add_argument("--dtype", default="auto", help="float32, bfloat16, ... (default: as saved)")
    command.add_argument("--quantization", choices=("bnb-4bit", "bnb-8bit"), help="load in 4 or 8 bit")
    command.add_argument(
        "--max-request-mb", type=float, default=20, help="largest request, images included (default: %(default)s)"
    )
    command.add_argument(
        "--max-megapixels", type=float, default=25, help="of all images of a request (default: %(default)s)"
    )
    command.add_argument(
        "--request-timeout",
        type=float,
        default=120,
        metavar="SECONDS",
        help="time a request has, its wait in the queue included; an answer is cut there (default: %(default)s)",
    )
    command.add_argument(
        "--max-waiting", type=int, default=16, help="requests in the queue, others get a 503 (default: %(default)s)"
    )


def run(args):
    check_policy(args.policy)
    model_name, _, revision = args.model.partition("@")
    check_model_type(model_name, "MODEL", revision or None)
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise ImportError(
            "The server needs fastapi, uvicorn and openai. Install them with: pip install 'safevlm[serve]'"
        )
    from safevlm.trainer.serving import Answering, Server, build_app, load

    for name in ("max_request_mb", "max_megapixels", "request_timeout", "max_waiting"):
        if not 0 < getattr(args, name) < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')} must be a number above 0, got {getattr(args, name)}.")
    if not 0 <= args.port < 2**16:
        raise ValueError(f"--port must be a number from 0 to 65535, got {args.port}.")
    check_device(None if args.device == "auto" else args.device)
    model, processor = load(model_name, revision or None, args.policy, args.device, args.dtype, args.quantization)
    app = build_app(
        Answering(model, processor, max_pixels=int(args.max_megapixels * 1_000_000)),
        args.model,
        max_request_mb=args.max_request_mb,
        seconds=args.request_timeout,
        max_waiting=args.max_waiting,
    )
    with suppress(KeyboardInterrupt):
        Server(app, args.host, args.port, args.request_timeout, f"Serving {args.model}").run()
