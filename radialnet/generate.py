"""Continue prompts with a trained run, token by token through the unified cache (`decode`).

    python -m radialnet.generate --workdir=DIR --prompt="def " [--max_new_tokens=64] [--temperature=0.8] [--stream]
    python -m radialnet.generate --workdir=DIR --prompt_file=FILE [--stats] [--trace=FILE.png]
    python -m radialnet.generate --workdir=DIR --prompts=FILE.jsonl [--rows=16]

--trace draws the way of every token: depth steps by tokens, in the colour of the layer. FILE.jsonl has a JSON object a
line: "prompt" and, where it is to differ from the flags, "max_new_tokens", "temperature", "top_k", "top_p", "min_p",
"repetition_penalty", "seed" or "stop" (a list). Either file may be "-", which is stdin. For each prompt, in order, a
line of JSON comes out: "prompt", "text", "tokens" (new ones), "reason" (length, stop or end) and "depth".
"""

import dataclasses
import json
import sys
import time
from collections.abc import Iterator

import numpy as np
from absl import flags

from radialnet import cli
from radialnet.checks import expanded
from radialnet.decode import Decoder
from radialnet.decode_requests import Completion, Request
from radialnet.plots import plot_trace
from radialnet.sampling import Sampling
from radialnet.sections import ConfigError
from radialnet.trained import TrainedModel, load_trained

MAX_TRACE = 2000  # Tokens of a trace.
SETTINGS = tuple(field.name for field in dataclasses.fields(Sampling))


def generate(trained: TrainedModel, prompt: str, max_new_tokens: int) -> str:
    """The greedy continuation of a prompt, without the prompt; it ends early where the model ends the document."""
    request = Request(tuple(trained.tokenizer.encode(prompt)), max_new_tokens)
    return Decoder(trained).run([request])[0].text


def request_of(trained: TrainedModel, fields: dict, where: str) -> Request:
    """A request from a line of a file or from flags.

    Args:
        where: what an error message says before the name of the field.

    Raises:
        ConfigError: a field is unknown, missing or not of its kind.
    """
    kinds = {"prompt": str, "max_new_tokens": int, "stop": list}
    kinds |= {field.name: type(field.default) for field in dataclasses.fields(Sampling)}
    unknown = sorted(set(fields) - set(kinds))
    if unknown:
        raise ConfigError(f"{where}{unknown[0]!r}: unknown; one of {', '.join(kinds)} is needed")
    for name, value in fields.items():
        kind = (int, float) if kinds[name] is float else kinds[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ConfigError(f"{where}{name}={value!r}: {kinds[name].__name__} is needed")
    if "prompt" not in fields:
        raise ConfigError(f"{where}prompt: missing")
    if fields["max_new_tokens"] < 1:
        raise ConfigError(f"{where}max_new_tokens={fields['max_new_tokens']}: at least 1 is needed")
    if not all(isinstance(stop, str) and stop for stop in fields["stop"]):
        raise ConfigError(f"{where}stop={fields['stop']!r}: strings that are not empty are needed")
    try:
        fields["prompt"].encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{where}prompt={fields['prompt']!a}: not UTF-8") from None
    try:
        sampling = Sampling(**{name: fields[name] for name in SETTINGS})
    except ConfigError as error:
        raise ConfigError(f"{where}{error}") from None
    prompt = tuple(trained.tokenizer.encode(fields["prompt"]))
    return Request(prompt, fields["max_new_tokens"], sampling, tuple(fields["stop"]))


def read_prompts(path: str, defaults: dict) -> list[tuple[str, dict]]:
    """The fields of each line, those of the flags filled in, and where they stand. "-" is stdin."""
    found = []
    for number, line in enumerate(_read(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}: "
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{where}not JSON ({error})") from None
        if not isinstance(fields, dict):
            raise ConfigError(f"{where}{fields!r}: a JSON object is needed")
        found.append((where, {**defaults, **fields}))
    if not found:
        raise ConfigError(f"{path}: no prompt in it")
    return found


def _read(path: str) -> str:
    content = sys.stdin.buffer.read() if path == "-" else expanded(path).read_bytes()
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None


def _in_order(decoder: Decoder, requests: list[Request]) -> Iterator[Completion]:
    """Each completion as soon as it and all before it are done."""
    waiting: dict[int, Completion] = {}
    wanted = 0
    for piece in decoder.stream(requests, every=64):
        if piece.completion:
            waiting[piece.index] = piece.completion
        while wanted in waiting:
            yield waiting.pop(wanted)
            wanted += 1


def statistics(decoder: Decoder, completions: list[Completion], seconds: float) -> dict:
    """What decoding cost; executions are those of new tokens and prompts."""
    stages = decoder.decoding.stages
    ran_ST = np.concatenate([done.ran_ST[:, stages.prelude : stages.first_coda] >= 0 for done in completions])
    num_new = sum(len(done.tokens) for done in completions)
    return {
        "new_tokens": num_new,
        "tokens_per_s": num_new / seconds,
        "depth": float(ran_ST.sum(1).mean()),
        "executed_by_step": ran_ST.mean(0).tolist(),
        "max_depth": stages.max_depth,
        "exit_bias": float(decoder.controllers.exit_bias),
        "cache_bytes": decoder.peak_bytes,
    }


def _show(found: dict) -> None:
    by_step = " ".join(f"{share:.2f}" for share in found["executed_by_step"])
    print(
        f"{found['new_tokens']} new tokens, {found['tokens_per_s']:,.1f} tokens/s with compilation; max depth "
        f"{found['max_depth']}, exit bias {found['exit_bias']:+.3f}: depth {found['depth']:.2f}, executed by step "
        f"{by_step}; cache {found['cache_bytes'] / 2**20:.2f} MiB in pages at most",
        file=sys.stderr,
    )


def _draw(trained: TrainedModel, decoder: Decoder, request: Request, done: Completion) -> None:
    """The trace of a completion, into the file that the flag names."""
    tokens = [trained.tokenizer.separator_id, *request.prompt, *done.tokens]
    texts = ["begin", *(trained.tokenizer.decode([token]) for token in tokens[1:])]
    stages = decoder.decoding.stages
    layer_ST = done.layer_ST[:, stages.prelude : stages.first_coda]
    layer_ST = np.where(layer_ST >= 0, layer_ST - stages.prelude, -1)
    plot_trace(texts, layer_ST, trained.config.model.pool_size, expanded(_TRACE.value), request.num_prefix)


def main() -> None:
    if sum(map(bool, (_PROMPT.value, _PROMPT_FILE.value, _PROMPTS.value))) > 1:
        raise ConfigError("--prompt, --prompt_file, --prompts: one of them is needed, not several")
    if _TRACE.value and _PROMPTS.value:
        raise ConfigError(f"--trace={_TRACE.value}: of one prompt, not of --prompts={_PROMPTS.value}")
    if _TRACE.value and not (_TRACE.value.endswith(".png") and expanded(_TRACE.value).parent.is_dir()):
        raise ConfigError(f"--trace={_TRACE.value}: a .png file in a folder that exists is needed")
    (exit_bias,) = cli.numbers("exit_bias", [str(_EXIT_BIAS.value)], float, "numbers")
    trained = load_trained(expanded(_WORKDIR.value))
    defaults = {name: flags.FLAGS[name].value for name in (*SETTINGS, "max_new_tokens")}
    defaults["stop"] = _STOP.value or []
    if _PROMPTS.value:
        lines = read_prompts(_PROMPTS.value, defaults)
    else:
        prompt = _read(_PROMPT_FILE.value) if _PROMPT_FILE.value else _PROMPT.value
        lines = [("--", {**defaults, "prompt": prompt})]
    requests = [request_of(trained, fields, where) for where, fields in lines]
    if _TRACE.value and (length := len(requests[0].prompt) + requests[0].max_new_tokens) > MAX_TRACE:
        raise ConfigError(f"--trace={_TRACE.value}: {length} tokens; at most {MAX_TRACE} can be drawn")
    decoder = Decoder(trained, min(_ROWS.value, len(requests)), _MAX_DEPTH.value, exit_bias)
    start = time.perf_counter()
    if _PROMPTS.value:
        completions = []
        for done in _in_order(decoder, requests):
            depth = float(statistics(decoder, [done], 1.0)["depth"])
            line = {"prompt": lines[done.index][1]["prompt"], "text": done.text, "tokens": done.tokens}
            print(json.dumps({**line, "reason": done.reason, "depth": depth}), flush=True)
            completions.append(done)
    else:
        if _STREAM.value:
            completions = []
            print(prompt, end="")
            for piece in decoder.stream(requests, every=1):
                print(piece.text, end="", flush=True)
                completions += [piece.completion] if piece.completion else []
            print()
        else:
            completions = decoder.run(requests)
            print(prompt + completions[0].text)
        if _TRACE.value:
            _draw(trained, decoder, requests[0], completions[0])
    if _STATS.value:
        _show(statistics(decoder, completions, time.perf_counter() - start))


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_string("workdir", None, "The run folder.", required=True)
    _PROMPT = flags.DEFINE_string("prompt", "", "What to continue.")
    _PROMPTS = flags.DEFINE_string("prompts", "", "A file of prompts as JSON lines, in place of --prompt; - is stdin.")
    _PROMPT_FILE = flags.DEFINE_string("prompt_file", "", "A file of text, in place of --prompt; - is stdin.")
    _ROWS = flags.DEFINE_integer("rows", 16, "Prompts at a time.", lower_bound=1, upper_bound=1024)
    flags.DEFINE_integer("max_new_tokens", 64, "Length of a continuation at most.")
    flags.DEFINE_float("temperature", 0.0, "Of the sampling; 0 takes the most likely token.")
    flags.DEFINE_integer("top_k", 0, "Draw from the k most likely tokens only; 0 = all.")
    flags.DEFINE_float("top_p", 1.0, "Draw from the most likely tokens that together have this probability only.")
    flags.DEFINE_float("min_p", 0.0, "Draw from tokens that have this share of the highest probability only.")
    flags.DEFINE_float("repetition_penalty", 1.0, "Of tokens that are in the text already.")
    flags.DEFINE_integer("seed", 0, "Of the sampling.")
    _STOP = flags.DEFINE_multi_string("stop", None, "A string at which the text ends; may be given more than once.")
    _MAX_DEPTH = flags.DEFINE_integer(
        "max_depth", None, "T in place of the trained one.", lower_bound=1, upper_bound=2**10
    )
    _EXIT_BIAS = flags.DEFINE_float("exit_bias", 0.0, "Added to the trained exit bias: more makes tokens leave early.")
    _STREAM = flags.DEFINE_bool("stream", False, "Print the text as it is written.")
    _TRACE = flags.DEFINE_string("trace", "", "PNG file for the way of every token through the layers.")
    _STATS = flags.DEFINE_bool("stats", False, "Print speed, depth and cache bytes to stderr at the end.")
    cli.run(main)
