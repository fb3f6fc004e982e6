"""`safevlm serve`: a model behind OpenAI's chat protocol, with the verdict in each reply."""

from contextlib import suppress

from safevlm.trainer.options import add_options, options_from
from safevlm.trainer.serving.serve_options import ServeOptions

from .common import add_command, check_device, check_model_type, check_policy, hide_loading_bars


def add(commands):
    command = add_command(
        commands,
        "serve",
        run,
        "Serve a model under its policy with OpenAI's chat protocol; each reply carries the verdict as `safety`.",
        example="safevlm serve demo/model --policy strict --port 8000",
    )
    command.add_argument("model", help="folder or Hub id of a SafeVLM; ID@REVISION for a commit, branch or tag")
    add_options(command, ServeOptions)


def run(args):
    options = options_from(args, ServeOptions)
    check_policy(options.policy)
    name, _, revision = args.model.partition("@")
    check_model_type(name, "MODEL", revision or None)
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise ImportError(
            "The server needs fastapi, uvicorn and openai. Install them with: pip install 'safevlm[serve]'"
        )
    check_device(None if options.device == "auto" else options.device)
    hide_loading_bars()
    from safevlm.trainer.serving.run import serve

    with suppress(KeyboardInterrupt):
        serve(args.model, options)
