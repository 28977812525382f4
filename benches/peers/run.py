#!/usr/bin/env python3
"""This project, ik_llama.cpp and llama.cpp side by side on this CPU: the model's speeds on a slice of the real layer
shapes, the operators, and the bars the project set itself.

    python3 benches/peers/run.py
        the peers come from PyPI into a throw-away environment: llama-cpp-python is compiled for this CPU,
        ik-llama-cpp-python comes compiled for any CPU with AVX2
    python3 benches/peers/run.py --llama BUILD --ik BUILD
        builds of both that have llama-bench and the libggml libraries, compiled for this CPU: the fairer comparison

Engines run in turns (A B C A B C ...), a process each; figures are medians over all turns. A peer that does not install or
lacks an operator is a line in the notes and an empty cell.
"""
import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OURS, IK, LLAMA = "qwen3next", "ik_llama.cpp", "llama.cpp"
PACKAGES = {LLAMA: ("llama-cpp-python", "llama_cpp"), IK: ("ik-llama-cpp-python", "ik_llama_cpp")}

# Name, prompt, generation, flags; quick runs take the first and the third.
TESTS = [("pp512", 512, 0, []), ("pp2048", 2048, 0, []), ("tg128", 0, 128, []),
         ("pp8192", 8192, 0, ["-b", "3072", "-ub", "768"])]
QUICK = ("pp512", "tg128")

# In the words of `qwen3next bench op`.
CASES = [
    *({"op": "gated_delta", "shape": "16/32x128", "dtype": "f32", "tokens": t} for t in (1, 64, 512)),
    {"op": "solve_tri", "shape": "64x64", "dtype": "f32", "tokens": 256},
    {"op": "solve_tri", "shape": "64x128", "dtype": "f32", "tokens": 64},
    *({"op": "causal_conv", "shape": "8192x4", "dtype": "f32", "tokens": t} for t in (1, 512)),
    *({"op": "matmul", "shape": "8192x2048", "dtype": d, "tokens": t} for d in ("q4_k", "q6_k") for t in (1, 512)),
    {"op": "matmul", "shape": "151936x2048", "dtype": "q6_k", "tokens": 1},
    *({"op": op, "shape": "512/10:512x2048", "dtype": "q4_k", "tokens": t}
      for op in ("moe_up", "moe_down") for t in (1, 512)),
    *({"op": "attention", "shape": "8192", "heads": "16/2", "dim": 256, "dtype": "f16", "tokens": t} for t in (1, 512)),
]

# Operators with weights: ours meet activations of 8 bits a value, as the peers' do.
WEIGHTS = ("matmul", "moe_up", "moe_down")

# What, against whom, how many times as fast. A test's ratio is ours over the peer's best setting.
BARS = [("pp512", IK, 1.15), ("pp2048", IK, 1.15), ("pp8192", IK, 1.25), ("tg128", IK, 1.0),
        ("pp512", LLAMA, 2.5), ("pp2048", LLAMA, 2.5), ("tg128", LLAMA, 1.25),
        (("gated_delta", "16/32x128", 512), LLAMA, 3.0), (("gated_delta", "16/32x128", 1), LLAMA, 1.5),
        (("solve_tri", "64x64", 256), LLAMA, 10.0)]
LOAD_BARS = {"mapped": 1.2, "repacked": 3.0}


class Missing(Exception):
    """Something could not be had; the message is one line."""


def say(text):
    print(text, file=sys.stderr, flush=True)


def last_line(text):
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""


class Runner:
    """Runs a command, in the real-time class where asked, and keeps its peak memory."""

    def __init__(self, realtime):
        self.realtime = realtime

    def first(self):
        if self.realtime:
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(10))

    def __call__(self, command, stdin=None):
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            start = time.perf_counter()
            child = subprocess.Popen([str(c) for c in command], stdout=out, stderr=err, cwd=ROOT,
                                     stdin=subprocess.PIPE if stdin else subprocess.DEVNULL, preexec_fn=self.first)
            if stdin:
                child.stdin.write(stdin.encode())
                child.stdin.close()
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
            seconds = time.perf_counter() - start
            out.seek(0)
            err.seek(0)
            stdout, stderr = out.read().decode(errors="replace"), err.read().decode(errors="replace")
        if child.returncode != 0:
            raise Missing(last_line(stderr) or f"ended with status {child.returncode}")
        unit = 1 if sys.platform == "darwin" else 1024
        return stdout, seconds, usage.ru_maxrss * unit

    def json(self, command, stdin=None):
        stdout, seconds, memory = self(command, stdin)
        # Some print lines of their own in between.
        stdout = "\n".join(line for line in stdout.splitlines() if re.match(r'\s*["\[\]{}\d-]', line))
        for start in re.finditer(r"^\[", stdout, re.M):
            try:
                return json.JSONDecoder().raw_decode(stdout[start.start():])[0], seconds, memory
            except ValueError:
                continue
        raise Missing(f"no JSON in its output: {last_line(stdout)}")


class Ours:
    name = OURS
    settings = long_settings = {"rtr 0": ["-mmp", "0", "-rtr", "0"], "rtr 1": ["-mmp", "0", "-rtr", "1"]}

    def __init__(self, binary):
        self.binary = binary
        self.version = subprocess.run([binary, "--version"], capture_output=True, text=True).stdout.strip()

    def bench(self, run, model, tests, flags, repetitions, threads):
        command = [self.binary, "bench", "model", "-m", model, *tests, *flags, "-t", threads, "-r", repetitions,
                   "-o", "json"]
        rows, _, memory = run.json(command)
        return rows, memory

    def operators(self, run, cases, threads, repetitions):
        results = []
        for case in cases:
            command = [self.binary, "bench", "op", case["op"], "--tokens", case["tokens"], "-t", threads, "-r", repetitions,
                       "-o", "json"]
            if case["op"] == "gated_delta":
                heads, dim = case["shape"].split("x")
                command += ["--heads", heads, "--dim", dim]
            else:
                command += ["--shape", case["shape"], "--dtype", case["dtype"]]
            if case["op"] in WEIGHTS:
                command += ["--form", "q8_r16"]
            if case["op"] == "attention":
                command += ["--heads", case["heads"], "--dim", case["dim"]]
            try:
                rows, _, _ = run.json(command)
                # The dispatch takes what is fastest where the variants' order is right: so do we.
                results.append({**case, **min(rows, key=lambda r: r["median_s"])})
            except Missing as error:
                results.append({**case, "error": str(error)})
        return results


class Tree:
    """A peer built by the caller: llama-bench, and libggml beside it or further down."""

    def __init__(self, name, folder, version):
        self.name = name
        folder = Path(folder).resolve()
        benches = [p for p in sorted(folder.rglob("llama-bench")) if p.is_file() and os.access(p, os.X_OK)]
        libs = sorted(folder.rglob("libggml.so")) + sorted(folder.rglob("libggml.dylib"))
        if not benches:
            raise Missing(f"no llama-bench below {folder.name}")
        self.binary, self.libs = benches[0], libs[0].parent if libs else None
        self.version = version
        usage = subprocess.run([self.binary, "--help"], capture_output=True, text=True)
        usage = usage.stdout + usage.stderr
        unmapped = ["-lm", "none"] if "--load-mode" in usage else ["-mmp", "0"]
        set_settings(self, lambda fa, rtr: unmapped + ["-fa", fa] + (["-rtr", rtr] if self.name == IK else []))

    def bench(self, run, model, tests, flags, repetitions, threads):
        command = [self.binary, "-m", model, *tests, *flags, "-t", threads, "-r", repetitions, "-o", "json"]
        rows, _, memory = run.json(command)
        self.version = self.version or f"native build, commit {rows[0].get('build_commit', 'unknown')}"
        return rows, memory

    def operators(self, run, cases, threads, repetitions):
        return ggml_operators(self, sys.executable, run, cases, threads, repetitions)


class Package:
    """A peer from PyPI."""

    def __init__(self, name, python):
        self.name, self.python = name, python
        package, self.module = PACKAGES[name]
        command = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        command += ["--no-binary", package] if name == LLAMA else []
        arguments = os.environ.get("CMAKE_ARGS", "") + " -DGGML_NATIVE=ON"
        say(f"{package}: installing" + (", which compiles llama.cpp" if name == LLAMA else ""))
        done = subprocess.run([*command, package, "gguf"], capture_output=True, text=True,
                              env={**os.environ, "CMAKE_ARGS": arguments.strip()})
        if done.returncode != 0:
            raise Missing(f"{package} does not install: {last_line(done.stderr)}")
        find = f"import importlib.util as u, importlib.metadata as m; print(u.find_spec('{self.module}').origin); " \
               f"print(m.version('{package}'))"
        origin, version = subprocess.run([python, "-c", find], capture_output=True, text=True, check=True).stdout.split()
        self.libs = Path(origin).parent / "lib"
        self.version = f"{package} {version}" + (", compiled here" if name == LLAMA else ", prebuilt for AVX2")
        set_settings(self, lambda fa, rtr: ["-fa", fa] + (["-rtr", rtr] if self.name == IK else []))

    def bench(self, run, model, tests, flags, repetitions, threads):
        command = [self.python, HERE / "llama_model.py", "--package", self.module, "-m", model, *tests, *flags,
                   "-t", threads, "-r", repetitions]
        rows, _, memory = run.json(command)
        return rows, memory

    def operators(self, run, cases, threads, repetitions):
        return ggml_operators(self, self.python, run, cases, threads, repetitions)


def set_settings(peer, flags):
    """Flash attention throughout; both with and without for the longest prompt. ik: with and without repacking."""
    repacks = (0, 1) if peer.name == IK else (0,)
    tag = lambda rtr: [f"rtr {rtr}"] if peer.name == IK else []
    peer.settings = {", ".join(tag(r)): flags(1, r) for r in repacks}
    peer.long_settings = {", ".join([*tag(r), f"fa {fa}"]): flags(fa, r) for r in repacks for fa in (0, 1)}


def ggml_operators(peer, python, run, cases, threads, repetitions):
    if not peer.libs:
        raise Missing("no libggml to time operators with")
    flavour = "ik" if peer.name == IK else "llama"
    command = [python, HERE / "ggml_ops.py", "--libs", peer.libs, "--flavour", flavour, "-t", threads, "-r", repetitions]
    return run.json(command, json.dumps(cases))[0]


def machine():
    info = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "system": platform.system()}
    try:
        text = Path("/proc/cpuinfo").read_text()
        model = re.search(r"^model name\s*:\s*(.*)$", text, re.M)
        flags = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.M)
        family = re.search(r"^cpu family\s*:\s*(.*)$", text, re.M)
        info["cpu"] = model[1] if model else info["cpu"]
        if family:
            info["cpu"] += f" (family {family[1]})"
        wanted = ("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_int8",
                  "asimd", "asimddp", "i8mm", "sve", "bf16")
        info["isa"] = [f for f in wanted if flags and f in flags[1].split()]
    except OSError:
        info["isa"] = []
    return info


def model_runs(engines, run, args, model, notes):
    """Samples by test, engine and setting; peak memory by engine."""
    samples, memory = {}, {}
    dead = set()
    tests = [t for t in TESTS if not args.quick or t[0] in QUICK]
    groups = {}
    for name, prompt, gen, flags in tests:
        groups.setdefault(tuple(flags), []).append((name, prompt, gen))
    for turn in range(args.turns):
        for flags, group in groups.items():
            for engine in engines:
                settings = engine.long_settings if flags else engine.settings
                for setting, own in settings.items():
                    if (engine.name, setting, flags) in dead:
                        continue
                    say(f"turn {turn + 1} of {args.turns}: {engine.name} {setting} {', '.join(t[0] for t in group)}")
                    prompts = ",".join(str(p) for _, p, _ in group if p) or "0"
                    gens = ",".join(str(g) for _, _, g in group if g) or "0"
                    try:
                        rows, peak = engine.bench(run, model, ["-p", prompts, "-n", gens], [*own, *flags],
                                                  1 if flags else args.repetitions, args.threads)
                    except Missing as error:
                        dead.add((engine.name, setting, flags))
                        notes.append(f"{engine.name} {setting} {' '.join(flags)}: {error}".replace("  ", " "))
                        continue
                    memory[engine.name] = max(memory.get(engine.name, 0), peak)
                    for name, prompt, gen in group:
                        for row in rows:
                            if (row["n_prompt"], row["n_gen"]) == (prompt, gen):
                                cell = samples.setdefault(name, {}).setdefault(engine.name, {})
                                cell.setdefault(setting, []).extend(row["samples_ts"])
    return samples, memory


def operator_runs(engines, run, args, notes):
    """Median seconds by case and engine."""
    cases = [c for c in CASES if not args.quick or c["op"] in ("gated_delta", "solve_tri")]
    times = [{} for _ in cases]
    variants = [{} for _ in cases]
    told = set()
    for turn in range(args.turns):
        for engine in engines:
            say(f"turn {turn + 1} of {args.turns}: {engine.name}, operators")
            try:
                results = engine.operators(run, cases, args.threads, args.repetitions)
            except Missing as error:
                results = [{"error": str(error)} for _ in cases]
            for i, result in enumerate(results):
                if "error" not in result:
                    times[i].setdefault(engine.name, []).append(result["median_s"])
                    variants[i][engine.name] = result.get("variant", "")
                    continue
                note = f"{engine.name}, {cases[i]['op']}: {result['error']}"
                if note not in told:
                    told.add(note)
                    notes.append(note)
    return [{**case, "median_s": {e: statistics.median(t) for e, t in times[i].items()}, "variant": variants[i]}
            for i, case in enumerate(cases)]


def load_times(engine, run, model, turns):
    """Seconds of a plain read of the file and of our load with one token, mapped and repacked, in turns, from a warm page
    cache."""
    buffer = memoryview(bytearray(8 << 20))

    def read():
        start = time.perf_counter()
        with open(model, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
        return time.perf_counter() - start

    read()
    plain, ours = [], {"mapped": [], "repacked": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(max(turns, 3)):
            plain.append(read())
            for how, flags in (("mapped", []), ("repacked", ["-rtr", "1"])):
                command = [engine.binary, "logits", "-m", model, "--tokens", "1", "--out", Path(folder) / "l.npy"]
                ours[how].append(run([*command, "--activations", "q8", *flags])[1])
    return {"plain_read_s": statistics.median(plain), **{how: statistics.median(s) for how, s in ours.items()}}


def best(cell):
    """The faster setting's name and median."""
    medians = {setting: statistics.median(s) for setting, s in cell.items()}
    setting = max(medians, key=medians.get)
    return setting, medians[setting]


def judge(report):
    """The bars with what came out."""
    rows = []
    for what, peer, need in BARS:
        got = None
        if isinstance(what, str):
            cell = report["model"].get(what, {})
            label = what
            if OURS in cell and peer in cell:
                got = best(cell[OURS])[1] / best(cell[peer])[1]
        else:
            label = f"{what[0]} {what[1]}, {what[2]} {'systems' if what[0] == 'solve_tri' else 'tokens'}"
            for case in report["operators"]:
                if (case["op"], case["shape"], case["tokens"]) == what and {OURS, peer} <= case["median_s"].keys():
                    got = case["median_s"][peer] / case["median_s"][OURS]
        rows.append({"what": f"{label} against {peer}", "need": f"≥ {need}×", "got": got,
                     "met": None if got is None else got >= need})
    load = report.get("load")
    for how, bar in LOAD_BARS.items():
        got = load and load[how] / load["plain_read_s"]
        rows.append({"what": f"load ({how}) and one token against a plain read of the file", "need": f"≤ {bar}×",
                     "got": got, "met": None if got is None else got <= bar})
    return rows


def ratio(ours, theirs):
    return f"{ours / theirs:.2f}×" if ours and theirs else "–"


def markdown(report):
    m, out = report["machine"], []
    peers = [n for n in (IK, LLAMA)]
    out.append(f"{m['cpu']}, {m['cores']} cores, {' '.join(m['isa'])}; {report['threads']} threads, "
               f"medians over {report['turns']} turns.")
    out.append("")
    out += [f"- {name}: {version}" for name, version in report["versions"].items()]
    if report["model"]:
        out += ["", f"| {report['slice']}, t/s | {OURS} | {IK} | {LLAMA} | against {IK} | against {LLAMA} |",
                "| --- | --- | --- | --- | --- | --- |"]
    for name, cells in report["model"].items():
        speed = {engine: best(cell) for engine, cell in cells.items()}
        show = lambda e: f"{speed[e][1]:.1f}" + (f" ({speed[e][0]})" if speed[e][0] else "") if e in speed else "–"
        value = lambda e: speed.get(e, (None, None))[1]
        out.append(f"| {name} | {' | '.join(show(e) for e in (OURS, *peers))} | "
                   f"{' | '.join(ratio(value(OURS), value(e)) for e in peers)} |")
    if report["memory"]:
        show = lambda e: f"{report['memory'][e] / 1e9:.2f}" if e in report["memory"] else "–"
        out.append(f"| peak memory, GB | {' | '.join(show(e) for e in (OURS, *peers))} | | |")
    if report.get("load"):
        load = report["load"]
        out += ["", f"Load and one token: {load['mapped']:.2f} s mapped, {load['repacked']:.2f} s repacked (`-rtr 1`); "
                    f"a plain read of the file: {load['plain_read_s']:.2f} s."]
    if report["operators"]:
        out += ["", f"| operator, µs | {OURS} | {IK} | {LLAMA} | against {IK} | against {LLAMA} |",
                "| --- | --- | --- | --- | --- | --- |"]
    for case in report["operators"]:
        t = case["median_s"]
        label = f"{case['op']} {case['shape']} {case['dtype']}, {case['tokens']}"
        show = lambda e: (f"{t[e] * 1e6:.1f}" + (f" ({case['variant'][e]})" if e == OURS else "")) if e in t else "–"
        out.append(f"| {label} | {' | '.join(show(e) for e in (OURS, *peers))} | "
                   f"{' | '.join(ratio(t.get(e), t.get(OURS)) for e in peers)} |")
    if report["model"] or report["operators"]:
        out += ["", "| bar | needed | got | |", "| --- | --- | --- | --- |"]
    for row in report["bars"] if report["model"] or report["operators"] else []:
        got = "–" if row["got"] is None else f"{row['got']:.2f}×"
        met = {None: "not measured", True: "met", False: "not met"}[row["met"]]
        out.append(f"| {row['what']} | {row['need']} | {got} | {met} |")
    if report["divergence"]:
        out += ["", "| divergence on the embedded model | mean KL | p99.9 | top-1 agreement |", "| --- | --- | --- | --- |"]
        out += [f"| {r['what']} | {r['kl_mean']:.2e} ± {r['kl_error']:.0e} | {r['kl_p99_9']:.2e} | "
                f"{100 * r['top1_agreement']:.2f} % |" for r in report["divergence"]]
    if report["notes"]:
        out += ["", *(f"- {note}" for note in report["notes"])]
    return "\n".join(out)


def our_binary(args):
    if args.qwen3next:
        return Path(args.qwen3next).resolve()
    say("cargo build --release")
    done = subprocess.run(["cargo", "build", "--release", "-p", "qwen3next-verify"], cwd=ROOT)
    if done.returncode != 0:
        raise SystemExit("run.py: cargo build failed; --qwen3next names a binary built elsewhere")
    return Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release" / "qwen3next"


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--llama", metavar="BUILD", help="a build of llama.cpp; by default llama-cpp-python is installed")
    ap.add_argument("--ik", metavar="BUILD", help="a build of ik_llama.cpp; by default ik-llama-cpp-python is installed")
    ap.add_argument("--llama-version", metavar="TEXT", help="what --llama is, for the table")
    ap.add_argument("--ik-version", metavar="TEXT", help="what --ik is, for the table")
    ap.add_argument("--qwen3next", metavar="BINARY", help="our command; by default cargo builds it")
    ap.add_argument("--model", metavar="GGUF", help="a qwen3next model; by default a slice with random weights is made")
    ap.add_argument("--layers", type=int, default=4, help="layers of the slice [default: 4]; 4 take 4.2 GB")
    ap.add_argument("--work", metavar="FOLDER", help="keep environment and slice here, and use what is there")
    ap.add_argument("-t", "--threads", type=int, default=os.cpu_count(), help="threads [default: one a core]")
    ap.add_argument("-r", "--repetitions", type=int, default=3, help="repetitions in a turn [default: 3]")
    ap.add_argument("--turns", type=int, default=3, help="turns of all engines [default: 3]")
    ap.add_argument("--quick", action="store_true", help="one turn, short tests, the delta rule's operators")
    ap.add_argument("--only", choices=["model", "operators", "divergence"], help="one part of the comparison")
    ap.add_argument("--realtime", action="store_true", help="in the real-time class, for a busy machine (root)")
    ap.add_argument("-o", "--output", choices=["md", "json"], default="md")
    args = ap.parse_args()
    if args.quick:
        args.turns = 1
    if args.realtime:
        try:
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(10))
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        except (AttributeError, OSError) as error:
            raise SystemExit(f"run.py: --realtime: {error}")
    part = lambda name: args.only in (None, name)

    notes = []
    with tempfile.TemporaryDirectory(prefix="peers-") as temporary:
        work = Path(args.work or temporary).resolve()
        work.mkdir(parents=True, exist_ok=True)
        binary = our_binary(args)
        if not os.access(binary, os.X_OK):
            raise SystemExit(f"run.py: {binary}: no such command")
        engines = [Ours(binary)]
        python = work / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
        for name, tree, version in ((IK, args.ik, args.ik_version), (LLAMA, args.llama, args.llama_version)):
            try:
                if tree:
                    engines.append(Tree(name, tree, version))
                    continue
                if not python.exists():
                    subprocess.run([sys.executable, "-m", "venv", work / "venv"], check=True)
                engines.append(Package(name, python))
            except (Missing, OSError, subprocess.CalledProcessError) as error:
                notes.append(f"{name}: {error}")
                say(notes[-1])

        run = Runner(args.realtime)
        busy = hasattr(os, "getloadavg") and os.getloadavg()[0] / os.cpu_count()
        if busy > 0.25 and not args.realtime:
            notes.append(f"The machine was busy when this began (load {busy:.1f} a core): engines that spin at barriers lose "
                         "most by that, so the ratios flatter those that do not. Run it alone, or with --realtime.")
        report = {"machine": machine(), "threads": args.threads, "turns": args.turns, "slice": "", "model": {},
                  "memory": {}, "operators": [], "divergence": [], "notes": notes}
        if part("model"):
            model = Path(args.model).resolve() if args.model else work / f"slice-{args.layers}.gguf"
            report["slice"] = model.name if args.model else f"{args.layers} layers, q4_k"
            if not model.exists():
                if args.model:
                    raise SystemExit(f"run.py: {model}: no such file")
                need = (0.4 + 0.95 * args.layers) * 1.1e9
                if shutil.disk_usage(work).free < need:
                    raise SystemExit(f"run.py: {work}: the slice needs {need / 1e9:.1f} GB; --work names another folder")
                say(f"{args.layers} layers of the real shapes with random weights")
                subprocess.run([binary, "synth", model, "--layers", str(args.layers), "--quant", "q4_k"], check=True,
                               stdout=subprocess.DEVNULL)
            report["model"], report["memory"] = model_runs(engines, run, args, model, notes)
            try:
                report["load"] = load_times(engines[0], run, model, args.turns)
            except Missing as error:
                notes.append(f"load: {error}")
        if part("operators"):
            report["operators"] = operator_runs(engines, run, args, notes)
        if part("divergence") and not args.quick:
            say("divergence of quantised paths on the embedded model")
            try:
                if not python.exists():
                    subprocess.run([sys.executable, "-m", "venv", work / "venv"], check=True)
                packages = ["gguf", "llama-cpp-python", "--no-binary", "llama-cpp-python"]
                if not any(isinstance(e, Package) and e.name == LLAMA for e in engines):
                    say("llama-cpp-python: installing, which compiles llama.cpp")
                done = subprocess.run([python, "-m", "pip", "install", "-q", *packages], capture_output=True, text=True,
                                      env={**os.environ, "CMAKE_ARGS": "-DGGML_NATIVE=ON"})
                if done.returncode != 0:
                    subprocess.run([python, "-m", "pip", "install", "-q", "gguf"], capture_output=True, check=True)
                    notes.append(f"llama-cpp-python does not install: {last_line(done.stderr)}")
                command = [python, HERE / "kl.py", "--qwen3next", binary, "-t", args.threads, "-o", "json"]
                report["divergence"] = Runner(False).json(command)[0]
            except (Missing, OSError, subprocess.CalledProcessError) as error:
                notes.append(f"divergence: {error}")
        report["versions"] = {e.name: e.version or "native build" for e in engines}
        report["bars"] = judge(report)
    print(json.dumps(report, indent=1, ensure_ascii=False) if args.output == "json" else markdown(report))


if __name__ == "__main__":
    main()
