"""`cotk bench` against llama-bench: the same random weights of real shapes, interleaved on this machine.

    compare_llama_cpp.py prepare --llama FOLDER [--work DIR] [--only CASE,…]
    compare_llama_cpp.py run     --llama FOLDER [--work DIR] [--only CASE,…] [--results DIR]
    compare_llama_cpp.py list

`prepare` writes a GGUF file of each case (`cotk export --synthetic`, dense matrices at 8 bit on both sides), holds
llama.cpp's logits over 64 teacher-forced positions to those of `cotk logits` (mean KL of 1e-3 nats or less) and finds
which of `--repack 0|1` is faster there. `run` measures: cotk, llama.cpp, cotk again, the file read before; the read
bandwidth is measured by `cotk bench` between its samples, so in the same minute. Calls of llama.cpp during which other
processes used more than 5 % of the machine are made again and counted; `cotk bench` does so by itself. One file a case:
RESULTS/engine-CASE.toml.

FOLDER is what build_llama_cpp.sh made (its build/bin is used); its system line must say AVX512_VNNI = 1. Needs numpy and
the Python package beside the build for `prepare`, nothing for `run`. Exits 1 when agreement is missed.
"""
import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
COTK = os.environ.get("COTK", str(ROOT / "target/debug/cotk"))

# name: (shape, layers, bits, has a peer, prompts, steps, batches). Half of Qwen1.5-MoE's layers at 8 bit: both programs'
# weights do not fit 23 GB of memory else.
CASES = {
    "olmoe-8": ("olmoe-1b-7b", None, 8, True, 512, 48, [1]),
    "olmoe-4": ("olmoe-1b-7b", None, 4, True, 512, 48, [1, 4]),
    "qwen15-8": ("qwen1.5-moe-a2.7b", 12, 8, True, 512, 32, [1]),
    "qwen15-4": ("qwen1.5-moe-a2.7b", None, 4, True, 512, 32, [1, 4]),
    "ref-8": ("ref-qwen2moe", None, 8, True, 512, 128, [1]),
    "ref-4": ("ref-qwen2moe", None, 4, True, 512, 128, [1]),
    "olmoe-3": ("olmoe-1b-7b", None, 3, False, 0, 32, [1]),
    "olmoe-2": ("olmoe-1b-7b", None, 2, False, 0, 32, [1]),
    "qwen15-2": ("qwen1.5-moe-a2.7b", None, 2, False, 0, 32, [1]),
    "busy": ("olmoe-1b-7b", None, 8, True, 0, 16, [1]),
}
FILE_OF = {"busy": "olmoe-8"}
DISTURBED = 0.05


def subject(case):
    shape, layers, bits = CASES[case][:3]
    return ["--synthetic", shape, "--bits", str(bits)] + (["--layers", str(layers)] if layers else [])


def gguf_of(args, case):
    return Path(args.work) / f"{FILE_OF.get(case, case)}.gguf"


def cotk(*arguments):
    done = subprocess.run([COTK, *arguments, "--json"], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"cotk {' '.join(arguments)}: {done.stdout}{done.stderr}")
    reply = json.loads(done.stdout)
    return reply["result"], reply["warnings"]


def ticks():
    fields = [int(n) for n in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    return sum(fields), sum(fields) - fields[3] - fields[4]


def children_ticks():
    used = os.times()
    return (used.children_user + used.children_system) * os.sysconf("SC_CLK_TCK")


def llama_bench(args, case, *more, tries=3, any_load=False, timeout=600):
    """Rows of llama-bench, and how many calls were thrown away because others used the machine."""
    command = [f"{args.llama}/build/bin/llama-bench", "-m", str(gguf_of(args, case)), "-ngl", "0", "-fa", "1",
               "-ctk", "f16", "-ctv", "f16", "-o", "json", *more]
    for dropped in range(tries):
        whole, busy = ticks()
        own = children_ticks()
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
        if done.returncode != 0:
            sys.exit(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        now_whole, now_busy = ticks()
        others = (now_busy - busy - (children_ticks() - own)) / max(now_whole - whole, 1)
        if any_load or others <= DISTURBED:
            break
    return json.loads(done.stdout), dropped


def read_file(path):
    with open(path, "rb", buffering=0) as file:
        while file.read(1 << 24):
            pass


def system_line(args):
    """What the build says of itself, by its shared library."""
    import ctypes
    folder = Path(args.llama) / "build/bin"
    for name in ("libggml-base.so", "libggml-cpu.so", "libggml.so", "libllama.so"):
        library = ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)
    library.llama_print_system_info.restype = ctypes.c_char_p
    line = library.llama_print_system_info().decode().strip()
    if "AVX512_VNNI = 1" not in line:
        sys.exit(f"this build has no AVX512_VNNI: {line}")
    return line


def ids(vocab):
    state, found = 1, []
    for _ in range(64):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        found.append((state >> 33) % vocab)
    return found


def prepare(args):
    ok = True
    Path(args.work).mkdir(parents=True, exist_ok=True)
    print(system_line(args))
    for case in args.only:
        if not CASES[case][3] or case in FILE_OF:
            continue
        path = gguf_of(args, case)
        if not path.exists():
            cotk("export", *subject(case), "--gguf", str(path))
        vocab = {"olmoe-1b-7b": 50304, "qwen1.5-moe-a2.7b": 151936, "ref-qwen2moe": 4096}[CASES[case][0]]
        tokens = ",".join(map(str, ids(vocab)))
        with tempfile.TemporaryDirectory(dir=args.work) as folder:
            cotk("logits", *subject(case), "--tokens", tokens, "--out", f"{folder}/l.npy")
            environment = dict(os.environ, LLAMA_CPP_LIB_PATH=f"{args.llama}/build/bin")
            environment["PYTHONPATH"] = next(
                str(p) for p in (Path(args.llama) / "source", Path(args.llama) / "src") if p.exists())
            done = subprocess.run(
                [sys.executable, str(HERE / "check_exports.py"), "logits", str(path), f"{folder}/l.npy", "--tokens", tokens],
                env=environment, capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith(("ok", "MISS"))]
        agreement = lines[-1] if lines else done.stderr[-2000:]
        print(case, agreement)
        ok &= done.returncode == 0
        rows, _ = llama_bench(args, case, "-p", "64", "-n", "12", "-t", "2", "-r", "2", "--repack", "0,1", any_load=True)
        best = {}
        for phase, key in (("prefill", "n_prompt"), ("decode", "n_gen")):
            rates = {row.get("repack", at // 2): row["avg_ts"] for at, row in enumerate(rows) if row[key]}
            best[phase] = int(max(rates, key=rates.get))
            print(case, phase, "tokens/s by --repack:", rates)
        path.with_suffix(".json").write_text(json.dumps({"agreement": agreement, "repack": best}))
    return ok


def median(rows, **wanted):
    """Of the rows of cotk bench with these values: rate, spread, and the row nearest to the median."""
    found = [row for row in rows if all(row[k] == v for k, v in wanted.items())]
    if not found:
        return None
    rate = statistics.median(row["tokens_per_s"] for row in found)
    row = dict(min(found, key=lambda row: abs(row["tokens_per_s"] - rate)))
    # The same weights at the median rate and the median bandwidth.
    bandwidth = statistics.median(r["bandwidth_gb_per_s"] for r in found)
    row["weight_gb_per_s"] *= rate / row["tokens_per_s"]
    row["pct_of_bandwidth"] = 100 * row["weight_gb_per_s"] / bandwidth
    row["gops"] *= rate / row["tokens_per_s"]
    row["bandwidth_gb_per_s"] = bandwidth
    row["tokens_per_s_spread"] = max(max(r["tokens_per_s_spread"] for r in found),
                                     (max(r["tokens_per_s"] for r in found) - min(r["tokens_per_s"] for r in found)) / 2)
    row["tokens_per_s"] = rate
    row["repeats"] = sum(r["repeats"] for r in found)
    row["dropped"] = sum(r["dropped"] for r in found)
    return row


def result_row(case, phase, batch, threads, ours, theirs):
    shape, layers, bits = CASES[case][:3]
    row = {
        "model": shape, "layers": layers, "phase": phase, "bits": bits, "batch": batch, "threads": threads,
        "cotk_tokens_per_s": ours["tokens_per_s"], "cotk_spread": ours["tokens_per_s_spread"],
        "llama_cpp_tokens_per_s": None, "llama_cpp_spread": None, "ratio": None,
        "pct_of_bandwidth": ours["pct_of_bandwidth"], "llama_cpp_pct_of_bandwidth": None,
        "bandwidth_gb_per_s": ours["bandwidth_gb_per_s"],
        "weight_gb_per_token": ours["weight_gb_per_s"] / ours["tokens_per_s"],
        "distinct_experts": ours["distinct_experts"],
        "pct_of_vnni_peak": ours["pct_of_peak"] if phase == "prefill" else None,
        "llama_cpp_pct_of_vnni_peak": None,
        "peak_gops": ours["peak_gops"] if phase == "prefill" else None,
        "samples": ours["repeats"], "dropped": ours["dropped"],
    }
    if theirs:
        rate, spread = theirs
        share = rate / ours["tokens_per_s"]
        row.update({"llama_cpp_tokens_per_s": rate, "llama_cpp_spread": spread, "ratio": 1 / share})
        if phase == "decode" and batch == 1:
            row["llama_cpp_pct_of_bandwidth"] = ours["pct_of_bandwidth"] * share
        if phase == "prefill":
            row["llama_cpp_pct_of_vnni_peak"] = ours["pct_of_peak"] * share
    return row


def toml(value):
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, float):
        return f"{value:.4g}" if "e" not in f"{value:.4g}" else str(round(value))
    return json.dumps(value)


def write(args, case, head, rows):
    lines = [f"# cotk against llama.cpp: {case}"]
    lines += [f"{key} = {toml(value)}" for key, value in head.items() if value is not None]
    for row in rows:
        lines += ["", "[[row]]"] + [f"{key} = {toml(value)}" for key, value in row.items() if value is not None]
    path = Path(args.results) / f"engine-{case}.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    for row in rows:
        theirs = row["llama_cpp_tokens_per_s"]
        print(f"{case:9} {row['phase']:8} batch {row['batch']} threads {row['threads']}: cotk {row['cotk_tokens_per_s']:8.1f}"
              + (f"  llama.cpp {theirs:8.1f}  ratio {row['ratio']:5.2f}" if theirs else " " * 34)
              + f"  {row['pct_of_bandwidth']:5.1f} % of {row['bandwidth_gb_per_s']:.1f} GB/s"
              + (f"  {row['pct_of_vnni_peak']:.1f} % of peak" if row["pct_of_vnni_peak"] else ""))
    sys.stdout.flush()


def head(args, case, command):
    model = next((l.split(":")[1].strip() for l in Path("/proc/cpuinfo").read_text().splitlines() if l.startswith("model name")), "?")
    git = lambda *a: subprocess.run(["git", "-C", str(ROOT), *a], capture_output=True, text=True).stdout.strip()
    changed = " with local changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    return {
        "machine": f"{model}, {os.cpu_count()} cores",
        "commit": git("rev-parse", "--short=12", "HEAD") + changed,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": "benches/peers/compare_llama_cpp.py run --only " + case,
        "cotk_command": command,
        "weights": "random, the same in both programs; dense matrices at 8 bit",
    }


def run_busy(args, case):
    """Decode beside a process that spins: 2 threads against 1 thread of the quiet machine."""
    common = ["bench", *subject(case), "--prompt", "0", "--generate", "16", "--repeats", "3"]
    quiet, _ = cotk(*common, "--threads", "1")
    their_quiet, _ = llama_bench(args, case, "-p", "0", "-n", "16", "-t", "1", "-r", "3")
    spinner = subprocess.Popen([sys.executable, "-c", "while True: pass"], preexec_fn=lambda: os.sched_setaffinity(0, {1}))
    try:
        busy, _ = cotk(*common, "--threads", "2", "--keep-disturbed")
        their_busy, _ = llama_bench(args, case, "-p", "0", "-n", "6", "-t", "2", "-r", "2", "--no-warmup", any_load=True)
    finally:
        spinner.kill()
        spinner.wait()
    rows = []
    for name, ours, theirs, threads in (("decode", quiet, their_quiet, 1), ("decode, busy", busy, their_busy, 2)):
        row = result_row(case, "decode", 1, threads, ours["rows"][0], (theirs[0]["avg_ts"], theirs[0]["stddev_ts"]))
        row["phase"] = name
        rows.append(row)
    rows[1]["pct_of_quiet_1_thread"] = 100 * rows[1]["cotk_tokens_per_s"] / rows[0]["cotk_tokens_per_s"]
    rows[1]["llama_cpp_pct_of_quiet_1_thread"] = 100 * rows[1]["llama_cpp_tokens_per_s"] / rows[0]["llama_cpp_tokens_per_s"]
    print(f"busy: cotk keeps {rows[1]['pct_of_quiet_1_thread']:.0f} %, llama.cpp {rows[1]['llama_cpp_pct_of_quiet_1_thread']:.0f} %")
    return rows, "cotk " + " ".join(common)


def run(args):
    line = system_line(args)
    for case in args.only:
        began = time.time()
        shape, layers, bits, has_peer, prompt, steps, batches = CASES[case]
        path = gguf_of(args, case)
        about = {}
        if has_peer:
            if not path.exists():
                sys.exit(f"{path} is missing: `compare_llama_cpp.py prepare` first")
            about = json.loads(path.with_suffix(".json").read_text())
            read_file(path)
        extra = {}
        if case == "busy":
            rows, command = run_busy(args, case)
        else:
            small = shape == "ref-qwen2moe"
            bench = ["bench", *subject(case), "--prompt", str(prompt), "--generate", str(steps), "--batch",
                     ",".join(map(str, batches)), "--threads", "1,2", "--repeats", "5" if small else "2"]
            command = "cotk " + " ".join(bench)
            result, warnings = cotk(*bench)
            ours, theirs, dropped = result["rows"], {}, 0
            if has_peer:
                read_file(path)
                for phase, flags in (("decode", ["-p", "0", "-n", str(steps), "-r", "5" if small else "3"]),
                                     ("prefill", ["-p", str(prompt), "-n", "0", "-r", "5" if small else "1"])):
                    # Both where it costs little, and the better one counts; else what `prepare` found.
                    both = small or phase == "decode"
                    repack = "0,1" if both else str(about["repack"][phase])
                    found, thrown = llama_bench(args, case, *flags, "-t", "1,2", "--repack", repack)
                    dropped += thrown
                    for row in found:
                        rate = (statistics.median(row["samples_ts"]), row["stddev_ts"])
                        key = (phase, row["n_threads"])
                        theirs[key] = max(theirs.get(key, (0, 0)), rate)
            again, more = cotk(*bench)
            ours += again["rows"]
            rows = []
            for threads in (1, 2):
                for phase, batch in [("prefill", 1)] * (prompt > 0) + [("decode", b) for b in batches]:
                    wanted = {"threads": threads, "batch": batch, "name": f"pp{prompt}" if phase == "prefill" else f"tg{steps}"}
                    peer = theirs.get((phase, threads)) if batch == 1 else None
                    rows.append(result_row(case, phase, batch, threads, median(ours, **wanted), peer))
                    if batch > 1:
                        alone = next(r for r in rows if r["phase"] == "decode" and r["batch"] == 1 and r["threads"] == threads)
                        rows[-1]["over_sequential"] = rows[-1]["cotk_tokens_per_s"] / alone["cotk_tokens_per_s"]
                        reads = rows[-1]["weight_gb_per_token"] * batch
                        rows[-1]["byte_limit_over_sequential"] = alone["weight_gb_per_token"] * batch / reads
                        print(f"{case}: batch {batch} over {batch} sequential streams, {threads} threads: "
                              f"{rows[-1]['over_sequential']:.2f} (bytes allow {rows[-1]['byte_limit_over_sequential']:.2f})")
            extra = {"distinct_expert_bytes_per_100_tokens": result["distinct_expert_bytes_per_100_tokens"],
                     "peak_rss_bytes": result["peak_rss_bytes"], "llama_cpp_calls_dropped": dropped,
                     "warnings": sorted(set(warnings + more)) or None}
        peer = {"llama_cpp": "llama-cpp-python 0.3.36, llama-bench -fa 1 -ctk f16 -ctv f16", "llama_cpp_system": line,
                "llama_cpp_repack": json.dumps(about["repack"]), "agreement": about["agreement"]} if has_peer else {}
        write(args, case, {**head(args, case, command), **peer, **extra, "seconds": round(time.time() - began)}, rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="what", required=True)
    parts.add_parser("list")
    for name in ("prepare", "run"):
        part = parts.add_parser(name)
        part.add_argument("--llama", required=True, help="folder of build_llama_cpp.sh")
        part.add_argument("--work", default="/tmp/cotk-peers", help="folder of the GGUF files (30 GB for all cases)")
        part.add_argument("--only", default=",".join(CASES), help="cases, separated by commas")
        part.add_argument("--results", default=str(ROOT / "benches/results"))
    args = parser.parse_args()
    if args.what == "list":
        print("\n".join(CASES))
        return
    args.only = args.only.split(",")
    unknown = [case for case in args.only if case not in CASES]
    if unknown:
        sys.exit(f"no case {', '.join(unknown)}; there are {', '.join(CASES)}")
    if args.what == "prepare":
        sys.exit(0 if prepare(args) else 1)
    run(args)


if __name__ == "__main__":
    main()
