"""`safevlm serve`: a model behind OpenAI's chat protocol, each answer with its verdict."""

from contextlib import suppress

from .common import add_command, check_device, check_model_type


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


def run(args):
    name, _, revision = args.model.partition("@")  # as transformers takes it apart
    check_model_type(name, "MODEL", revision or None)
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise ImportError(
            "The server needs fastapi, uvicorn and openai. Install them with: pip install 'safevlm[serve]'"
        )
    import uvicorn

    from safevlm import SafetyPolicy
    from safevlm.trainer.serving import Server, build_app, load

    if args.policy is not None:
        SafetyPolicy.from_value(args.policy)  # a clear error before a model is loaded
    check_device(None if args.device == "auto" else args.device)
    manager = load(args.model, args.policy, device=args.device, dtype=args.dtype, quantization=args.quantization)
    config = uvicorn.Config(build_app(manager, args.max_request_mb), args.host, args.port, log_level="warning")
    with suppress(KeyboardInterrupt):
        Server(config, f"Serving {args.model}").run()
