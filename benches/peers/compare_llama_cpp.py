"""`cotk bench` against llama-bench: the same random weights of real shapes, in turn on this machine.

    compare_llama_cpp.py list
    compare_llama_cpp.py run --llama FOLDER [--only CASE,…] [--work DIR] [--results DIR] [--again] [--keep] [--seconds N]

Case by case, so that one GGUF file at a time is on disk: writes it (`cotk export --synthetic`, dense matrices at 8 bit on
both sides), holds llama.cpp's logits over 64 teacher-forced positions to those of `cotk logits` (mean KL of 1e-3 nats or
less), measures, deletes it. Measured are cotk, llama.cpp, cotk again; the read bandwidth stands beside each row from the
same minute: `cotk bench` measures it between its samples, and a short `cotk bench` after each call of llama.cpp. Calls of
llama.cpp during which other processes used more than 5 % of the machine are made again and counted; `cotk bench` drops and
counts its samples by itself. llama.cpp decodes with both values of `--repack`, and the better one counts.

One file a case: RESULTS/engine-CASE.toml. A case whose file is of the same cotk binary is not measured again (--again
does), so a stopped run goes on where it was. --seconds ends it before a case that would take longer than what is left
(`list` says what cases took on 2 cores). Nothing else should run on the machine.

FOLDER is what build_llama_cpp.sh made (its build/bin is used); its system line must say AVX512_VNNI = 1. Needs numpy and
the Python package beside the build. Exits 1 when an agreement is missed.
"""
import argparse
import datetime
import hashlib
import json
import os
import statistics
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
COTK = os.environ.get("COTK", str(ROOT / "target/debug/cotk"))

# name: (shape, layers, bits, has a peer, prompt, steps, batches, about how many seconds). Half of Qwen1.5-MoE's layers at 8
# bit: both programs' weights do not fit 23 GB of memory else. `busy` takes the file of the case before it, `first-token`
# has no peer.
CASES = {
    "ref-8": ("ref-qwen2moe", None, 8, True, 512, 128, [1, 4], 60),
    "ref-4": ("ref-qwen2moe", None, 4, True, 512, 128, [1, 4], 60),
    "olmoe-4": ("olmoe-1b-7b", None, 4, True, 512, 48, [1, 4], 330),
    "olmoe-8": ("olmoe-1b-7b", None, 8, True, 512, 48, [1, 4], 350),
    "busy": ("olmoe-1b-7b", None, 8, True, 0, 16, [1], 80),
    "qwen15-4": ("qwen1.5-moe-a2.7b", None, 4, True, 512, 32, [1, 4], 550),
    "qwen15-8": ("qwen1.5-moe-a2.7b", 12, 8, True, 512, 32, [1, 4], 330),
    "olmoe-3": ("olmoe-1b-7b", None, 3, False, 0, 32, [1], 40),
    "olmoe-2": ("olmoe-1b-7b", None, 2, False, 0, 32, [1], 40),
    "qwen15-2": ("qwen1.5-moe-a2.7b", None, 2, False, 0, 32, [1], 50),
    "first-token": ("olmoe-1b-7b", None, 4, False, 0, 8, [1], 55),
}
FILE_OF = {"busy": "olmoe-8"}
VOCAB = {"olmoe-1b-7b": 50304, "qwen1.5-moe-a2.7b": 151936, "ref-qwen2moe": 4096}
DISTURBED = 0.05


def subject(case):
    shape, layers, bits = CASES[case][:3]
    return ["--synthetic", shape, "--bits", str(bits)] + (["--layers", str(layers)] if layers else [])


def gguf_of(args, case):
    return Path(args.work) / f"{FILE_OF.get(case, case)}.gguf"


def binary():
    """Of the program that is measured: results of another are not these."""
    with open(COTK, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


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
    """Rows of llama-bench, how many calls were thrown away because others used the machine, and others' share of the last."""
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
    return json.loads(done.stdout), dropped, max(others, 0.0)


def read_bandwidth(threads):
    """GB/s of this minute, as `cotk bench` measures it."""
    result, _ = cotk("bench", "--synthetic", "ref-qwen2moe", "--layers", "1", "--bits", "2", "--prompt", "0", "--generate",
                     "8", "--repeats", "3", "--threads", str(threads), "--keep-disturbed")
    return result["rows"][0]["bandwidth_gb_per_s"]


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


def prepare(args, case):
    """Writes the file of a case; what it says of agreement, whether that is enough, and the better --repack of prefill."""
    path = gguf_of(args, case)
    said = path.with_suffix(".json")
    if path.exists() and said.exists():
        about = json.loads(said.read_text())
        if about["binary"] == binary():
            return about
    path.parent.mkdir(parents=True, exist_ok=True)
    cotk("export", *subject(case), "--gguf", str(path))
    tokens = ",".join(map(str, ids(VOCAB[CASES[case][0]])))
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        cotk("logits", *subject(case), "--tokens", tokens, "--out", f"{folder}/l.npy")
        environment = dict(os.environ, LLAMA_CPP_LIB_PATH=f"{args.llama}/build/bin")
        environment["PYTHONPATH"] = next(
            str(p) for p in (Path(args.llama) / "source", Path(args.llama) / "src") if p.exists())
        done = subprocess.run(
            [sys.executable, str(HERE / "check_exports.py"), "logits", str(path), f"{folder}/l.npy", "--tokens", tokens],
            env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("ok", "MISS"))]
    about = {"agreement": lines[-1] if lines else done.stderr[-2000:], "agrees": done.returncode == 0, "binary": binary()}
    print(case, about["agreement"], flush=True)
    rows, _, _ = llama_bench(args, case, "-p", "64", "-n", "0", "-t", "2", "-r", "1", "--repack", "0,1", any_load=True)
    rates = {row.get("repack", at): row["avg_ts"] for at, row in enumerate(rows)}
    about["repack"] = int(max(rates, key=rates.get))
    said.write_text(json.dumps(about))
    return about


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
    row["others_pct"] = max(r["others_pct"] for r in found)
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
        share = theirs["rate"] / ours["tokens_per_s"]
        row.update({"llama_cpp_tokens_per_s": theirs["rate"], "llama_cpp_spread": theirs["spread"], "ratio": 1 / share,
                    "llama_cpp_repack": theirs["repack"], "llama_cpp_samples": theirs["samples"],
                    "llama_cpp_calls_dropped": theirs["dropped"], "llama_cpp_others_pct": 100 * theirs["others"],
                    "llama_cpp_bandwidth_gb_per_s": theirs["bandwidth"]})
        if phase == "decode" and batch == 1:
            gb_per_s = theirs["rate"] * row["weight_gb_per_token"]
            row["llama_cpp_pct_of_bandwidth"] = 100 * gb_per_s / theirs["bandwidth"]
        if phase == "prefill":
            row["llama_cpp_pct_of_vnni_peak"] = ours["pct_of_peak"] * share
    row["cotk_others_pct"] = ours["others_pct"]
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
    changed = " with local changes" if git("status", "--porcelain", "--untracked-files=no", "--", "crates", "Cargo.toml", "Cargo.lock") else ""
    return {
        "machine": f"{model}, {os.cpu_count()} cores",
        "commit": git("rev-parse", "--short=12", "HEAD") + changed,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": "benches/peers/compare_llama_cpp.py run --only " + case,
        "cotk_command": command,
        "cotk_binary": binary(),
        "weights": "random, the same in both programs; dense matrices at 8 bit",
    }


def peer(args, case, phase, threads, prompt, steps, repack):
    """llama.cpp at one thread count: medians, for a prompt the best (its first sample warms up for the others)."""
    small = CASES[case][0] == "ref-qwen2moe"
    if phase == "prefill":
        flags = ["-p", str(prompt), "-n", "0", "-r", "5" if small else "2", "--no-warmup"]
    else:
        flags = ["-p", "0", "-n", str(steps), "-r", "5" if small else "3"]
    both = small or phase == "decode"
    rows, dropped, others = llama_bench(args, case, *flags, "-t", str(threads), "--repack", "0,1" if both else str(repack))
    pick = max if phase == "prefill" else statistics.median
    best = max(rows, key=lambda row: pick(row["samples_ts"]))
    return {"rate": pick(best["samples_ts"]), "spread": best["stddev_ts"], "samples": len(best["samples_ts"]),
            "repack": int(best.get("repack", repack)), "dropped": dropped, "others": others,
            "bandwidth": read_bandwidth(threads)}


def run_busy(args, case):
    """Decode beside a process that spins: 2 threads against 1 thread of the quiet machine."""
    common = ["bench", *subject(case), "--prompt", "0", "--generate", "16", "--repeats", "3"]
    quiet, _ = cotk(*common, "--threads", "1")
    their_quiet = peer(args, case, "decode", 1, 0, 16, 1)
    spinner = subprocess.Popen([sys.executable, "-c", "while True: pass"], preexec_fn=lambda: os.sched_setaffinity(0, {1}))
    try:
        busy, _ = cotk(*common, "--threads", "2", "--keep-disturbed")
        rows, _, others = llama_bench(args, case, "-p", "0", "-n", "6", "-t", "2", "-r", "2", "--no-warmup", "--repack",
                                      str(their_quiet["repack"]), any_load=True)
        their_busy = {"rate": rows[0]["avg_ts"], "spread": rows[0]["stddev_ts"], "samples": 2, "dropped": 0, "others": others,
                      "repack": their_quiet["repack"], "bandwidth": busy["rows"][0]["bandwidth_gb_per_s"]}
    finally:
        spinner.kill()
        spinner.wait()
    rows = []
    for name, ours, theirs, threads in (("decode", quiet, their_quiet, 1), ("decode, busy", busy, their_busy, 2)):
        row = result_row(case, "decode", 1, threads, ours["rows"][0], theirs)
        row["phase"] = name
        rows.append(row)
    rows[1]["pct_of_quiet_1_thread"] = 100 * rows[1]["cotk_tokens_per_s"] / rows[0]["cotk_tokens_per_s"]
    rows[1]["llama_cpp_pct_of_quiet_1_thread"] = 100 * rows[1]["llama_cpp_tokens_per_s"] / rows[0]["llama_cpp_tokens_per_s"]
    print(f"busy: cotk keeps {rows[1]['pct_of_quiet_1_thread']:.0f} %, llama.cpp {rows[1]['llama_cpp_pct_of_quiet_1_thread']:.0f} %")
    return rows, {}, "cotk " + " ".join(common)


def run_first_token(args, case):
    """A container in page cache: the first token of a fresh process, and memory once everything was used."""
    folder = Path(args.work) / "container"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        cotk("export", *subject(case), "--container", str(folder))
        common = ["bench", str(folder), "--prompt", "0", "--generate", "8", "--repeats", "3"]
        found = []
        for _ in range(5):
            for file in folder.iterdir():
                read_file(file)
            found.append(cotk(*common)[0])
        rows = [result_row(case, "decode", 1, row["threads"], row, None) for row in found[-1]["rows"]]
        last = found[-1]
        extra = {
            "container_bytes": sum(file.stat().st_size for file in folder.iterdir()),
            "first_token_s": statistics.median(f["first_token_s"] for f in found),
            "first_token_s_all": [round(f["first_token_s"], 3) for f in found],
            "weight_bytes": last["whole_weight_bytes"],
            "peak_rss_bytes": last["whole_peak_rss_bytes"],
            "peak_over_weights": last["whole_peak_rss_bytes"] / last["whole_weight_bytes"],
            "of_that_own_bytes": last["whole_own_bytes"],
            "of_that_mapped_bytes": last["whole_mapped_bytes"],
        }
        print(f"first token after {extra['first_token_s']:.2f} s, peak memory {extra['peak_over_weights']:.3f} of the weights")
        return rows, extra, "cotk " + " ".join(common).replace(str(folder), "CONTAINER")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_case(args, case, about):
    """Rows of one case, what else there is to say, and the command of cotk."""
    shape, layers, bits, has_peer, prompt, steps, batches, _ = CASES[case]
    small = shape == "ref-qwen2moe"
    bench = ["bench", *subject(case), "--prompt", str(prompt), "--generate", str(steps), "--batch",
             ",".join(map(str, batches)), "--threads", "1,2", "--repeats", "5" if small else "2"]
    result, warnings = cotk(*bench)
    ours, theirs = result["rows"], {}
    phases = ["prefill"] * (prompt > 0) + ["decode"]
    if has_peer:
        read_file(gguf_of(args, case))
        for threads in (1, 2):
            for phase in reversed(phases):
                theirs[phase, threads] = peer(args, case, phase, threads, prompt, steps, about["repack"])
    again, more = cotk(*bench)
    ours += again["rows"]
    rows = []
    for threads in (1, 2):
        for phase, batch in [("prefill", 1)] * (prompt > 0) + [("decode", b) for b in batches]:
            wanted = {"threads": threads, "batch": batch, "name": f"pp{prompt}" if phase == "prefill" else f"tg{steps}"}
            found = theirs.get((phase, threads)) if batch == 1 else None
            rows.append(result_row(case, phase, batch, threads, median(ours, **wanted), found))
            if batch > 1:
                alone = next(r for r in rows if r["phase"] == "decode" and r["batch"] == 1 and r["threads"] == threads)
                rows[-1]["over_sequential"] = rows[-1]["cotk_tokens_per_s"] / alone["cotk_tokens_per_s"]
                reads = rows[-1]["weight_gb_per_token"] * batch
                rows[-1]["byte_limit_over_sequential"] = alone["weight_gb_per_token"] * batch / reads
                print(f"{case}: batch {batch} over {batch} sequential streams, {threads} threads: "
                      f"{rows[-1]['over_sequential']:.2f} (bytes allow {rows[-1]['byte_limit_over_sequential']:.2f})")
    extra = {"distinct_expert_bytes_per_100_tokens": result["distinct_expert_bytes_per_100_tokens"],
             "peak_rss_bytes": result["peak_rss_bytes"], "warnings": sorted(set(warnings + more)) or None}
    return rows, extra, "cotk " + " ".join(bench)


def is_done(args, case):
    path = Path(args.results) / f"engine-{case}.toml"
    return path.exists() and f'cotk_binary = "{binary()}"' in path.read_text()


def run(args):
    line = system_line(args)
    deadline = time.time() + args.seconds if args.seconds else None
    ok = True
    for at, case in enumerate(args.only):
        has_peer, about_s = CASES[case][3], CASES[case][7]
        if is_done(args, case) and not args.again:
            print(f"{case}: measured with this binary before", flush=True)
            continue
        if deadline and time.time() + about_s > deadline:
            print(f"{case}: takes about {about_s} s, left for another call", flush=True)
            continue
        began = time.time()
        path = gguf_of(args, case)
        about = prepare(args, FILE_OF.get(case, case)) if has_peer else {}
        ok &= about.get("agrees", True)
        prepared = time.time()
        if has_peer:
            read_file(path)
        measure = {"busy": lambda: run_busy(args, case), "first-token": lambda: run_first_token(args, case)}
        rows, extra, command = measure.get(case, lambda: run_case(args, case, about))()
        said = {"llama_cpp": "llama-cpp-python 0.3.36, llama-bench -fa 1 -ctk f16 -ctv f16", "llama_cpp_system": line,
                "agreement": about["agreement"]} if has_peer else {}
        seconds = {"seconds": round(time.time() - began), "seconds_of_that_preparing": round(prepared - began)}
        write(args, case, {**head(args, case, command), **said, **extra, **seconds}, rows)
        still = [path] * any(gguf_of(args, later) == path and not is_done(args, later) for later in args.only[at + 1:])
        if has_peer and not args.keep and not still:
            path.unlink(missing_ok=True)
            path.with_suffix(".json").unlink(missing_ok=True)
    return ok


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="what", required=True)
    parts.add_parser("list")
    part = parts.add_parser("run")
    part.add_argument("--llama", required=True, help="folder of build_llama_cpp.sh")
    part.add_argument("--work", default="/tmp/cotk-peers", help="folder of the GGUF files (8 GB at a time)")
    part.add_argument("--only", default=",".join(CASES), help="cases, separated by commas")
    part.add_argument("--results", default=str(ROOT / "benches/results"))
    part.add_argument("--again", action="store_true", help="also what this binary was measured on before")
    part.add_argument("--keep", action="store_true", help="keep the GGUF files")
    part.add_argument("--seconds", type=float, help="begin no case that takes longer than what is left of these")
    args = parser.parse_args()
    if args.what == "list":
        print("\n".join(f"{name:12} about {about[7]} s" for name, about in CASES.items()))
        return
    args.only = args.only.split(",")
    unknown = [case for case in args.only if case not in CASES]
    if unknown:
        sys.exit(f"no case {', '.join(unknown)}; there are {', '.join(CASES)}")
    sys.exit(0 if run(args) else 1)


if __name__ == "__main__":
    main()
