"""The command line: `sqjax demo`, `sqjax schemes`, `sqjax decode`, `sqjax benchmark`."""

import argparse
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status. Errors of the user's making are one line on stderr."""
    parser = argparse.ArgumentParser(prog="sqjax", description="Post-training quantization for JAX")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo", help="quantize a real language model to int8 and show accuracy and speed"
    )
    demo.add_argument(
        "--quick", action="store_true", help="an impatient minute: less text, fewer repeats"
    )
    demo.add_argument(
        "--alpha", type=float, default=0.85, help="smoothing strength, 0 to 1 (default 0.85)"
    )
    demo.add_argument(
        "--model", default="smollm2-135m", help="a name, a .gguf file or a Hugging Face directory"
    )
    demo.add_argument(
        "--float-head", action="store_true", help="keep lm_head in float, as the authors do"
    )
    accuracy = commands.add_parser(
        "schemes", help="the perplexity of a real language model in every scheme"
    )
    accuracy.add_argument("--quick", action="store_true", help="less text")
    accuracy.add_argument(
        "--alpha", type=float, default=0.85, help="smoothing strength, 0 to 1 (default 0.85)"
    )
    accuracy.add_argument(
        "--model", default="smollm2-135m", help="a name, a .gguf file or a Hugging Face directory"
    )
    speed = commands.add_parser(
        "benchmark", help="time every scheme beside float32, bfloat16 and qwix"
    )
    speed.add_argument(
        "--quick", action="store_true", help="a few minutes: one small model, fewer repeats"
    )
    decoding = commands.add_parser(
        "decode", help="accuracy and speed of decoding with a quantized key/value cache"
    )
    decoding.add_argument("--quick", action="store_true", help="less text, fewer repeats")
    decoding.add_argument("--only", choices=("accuracy", "speed"), help="one of the two tables")
    decoding.add_argument(
        "--model", default="smollm2-135m", help="a name, a .gguf file or a Hugging Face directory"
    )
    options = parser.parse_args(arguments)
    try:
        _run(options)
    except (ValueError, RuntimeError, ImportError) as error:
        print(f"sqjax: {error}", file=sys.stderr)
        return 1
    return 0


def _run(options: argparse.Namespace) -> None:
    if options.command == "benchmark":
        from sqjax.commands import benchmark

        if options.quick:
            benchmark.benchmark(benchmark.QUICK, ("llama-shaped",))
        else:
            benchmark.benchmark()
        return
    if options.command == "decode":
        from sqjax.commands import decode as decoding

        decoding.run(options.model, options.quick, options.only)
        return
    from sqjax.commands.demo import FULL, QUICK, demo

    if options.command == "schemes":
        from sqjax.commands.schemes import compare

        compare(QUICK if options.quick else FULL, options.alpha, options.model)
        return
    demo(QUICK if options.quick else FULL, options.alpha, options.model, options.float_head)


if __name__ == "__main__":
    sys.exit(main())
