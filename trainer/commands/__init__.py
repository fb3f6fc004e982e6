"""The commands of `safevlm`, a module each: `add(commands)` declares a command, `run(args)` carries it out."""
