"""The two-stage shape (a brain of 5 ms, hands of 500 ms, one process each) in Efferent, Ray Serve and Celery + Redis, in turns, in one run.

    python -m venv peers && peers/bin/pip install "ray[serve]==2.60.0" "celery[redis]==5.7.0"
    peers/bin/python tests/peers/queues.py --redis-server "$(which redis-server)" --out queues.json

Stages only sleep, so what is compared is what the systems themselves cost. Each system runs at its best for this shape that we know of: hands hold one
request in reserve, so that they need not wait for the next. Efficiency is measured over theoretical throughput with twice as many requests open as
workers hold; each picture counts by the part of its rendering that falls into the measured time. Overhead is the latency of one request at a time,
without the two stages. Efferent and Celery keep what was accepted through a crash (JetStream and Redis sync at every write unless told otherwise);
Ray Serve keeps nothing.
"""
import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BRAIN, HAND = .005, .5
# How long to let things settle before measuring, beyond the time to fill the hands.
WARM_UP = 6


# --- the load ----------------------------------------------------------------------------------------------------
def closed_loop(request, open_requests, seconds, warm_up):
    """Keeps requests open; (start and end of each rendering, latencies, the measured time)."""
    renders, latencies, stop = [], [], threading.Event()

    def client():
        while not stop.is_set():
            began = time.time()
            render = request()
            latencies.append((began, time.time() - began))
            renders.append(render)

    threads = [threading.Thread(target=client, daemon=True) for _ in range(open_requests)]
    for thread in threads:
        thread.start()
    time.sleep(warm_up)
    begin = time.time()
    time.sleep(seconds)
    end = time.time()
    stop.set()
    for thread in threads:
        thread.join(timeout=120)
    return renders, latencies, begin, end


def measure(request, hands, options):
    """Efficiency with every hand busy, then overhead with one request at a time."""
    ideal = min(hands / HAND, 1 / BRAIN)
    warm_up = WARM_UP + hands * BRAIN + 2 * HAND
    renders, _, begin, end = closed_loop(request, 2 * (hands + 2), options.seconds, warm_up)
    done = sum(max(0, min(stop, end) - max(start, begin)) / (stop - start) for start, stop in renders)
    _, latencies, begin, end = closed_loop(request, 1, options.seconds, 2)
    overheads = sorted(latency - BRAIN - HAND for began, latency in latencies if began >= begin)
    quantile = lambda share: overheads[round((len(overheads) - 1) * share)] * 1000
    return {"images_per_second": done / (end - begin), "efficiency": done / options.seconds / ideal, "overhead_p50_ms": quantile(.5), "overhead_p99_ms": quantile(.99),
            "requests": len(overheads)}


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


# --- Efferent ----------------------------------------------------------------------------------------------------
def efferent(hands, options):
    def bench(*more):
        command = [options.binary, "bench", "cluster", "--brains", 1, "--hands", hands, "--brain-time", f"{BRAIN * 1000:.0f}ms", "--hand-time",
                   f"{HAND * 1000:.0f}ms", "--steps", 1, "--processes", "hands", "--duration", f"{options.seconds}s", "--sync", options.sync,
                   "--nats-server", options.nats_server, "--json", *more]
        return json.loads(subprocess.run([str(part) for part in command], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout)

    busy, alone = bench(), bench("--in-flight", 1, "--warm-up", "2s")
    beyond = alone["beyond_stages"]
    return {"images_per_second": busy["throughput"]["measured"], "efficiency": busy["throughput"]["efficiency"], "overhead_p50_ms": beyond["p50"] * 1000,
            "overhead_p99_ms": beyond["p99"] * 1000, "requests": round(alone["throughput"]["ended"] * options.seconds)}


# --- Ray Serve ---------------------------------------------------------------------------------------------------
def ray_serve(hands, options):
    import logging

    import ray
    from ray import serve

    @serve.deployment(num_replicas=1, max_ongoing_requests=1000, ray_actor_options={"num_cpus": .01})
    class Brain:
        def __init__(self):
            import asyncio
            self.turn = asyncio.Lock()

        async def __call__(self, prompt):
            import asyncio
            async with self.turn:
                await asyncio.sleep(BRAIN)
            return prompt

    @serve.deployment(num_replicas=hands, max_ongoing_requests=2, ray_actor_options={"num_cpus": .01})
    class Hand:
        def __init__(self):
            import asyncio
            self.turn = asyncio.Lock()

        async def __call__(self, signal):
            import asyncio
            async with self.turn:
                start = time.time()
                await asyncio.sleep(HAND)
                return start, time.time()

    @serve.deployment(num_replicas=1, max_ongoing_requests=10_000, ray_actor_options={"num_cpus": .01})
    class Pipeline:
        def __init__(self, brain, hand):
            self.brain, self.hand = brain, hand

        async def __call__(self, prompt):
            return await self.hand.remote(await self.brain.remote(prompt))

    ray.init(num_cpus=4, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    try:
        handle = serve.run(Pipeline.bind(Brain.bind(), Hand.bind()), route_prefix=None)
        handle.remote("warm").result()
        return measure(lambda: handle.remote("a red apple").result(), hands, options)
    finally:
        serve.shutdown()
        ray.shutdown()


# --- Celery ------------------------------------------------------------------------------------------------------
CELERY = """
import os, time
from celery import Celery
app = Celery("two", broker=os.environ["REDIS"], backend=os.environ["REDIS"])
app.conf.update(task_acks_late=True, worker_prefetch_multiplier=1, task_routes={"two.brain": {"queue": "brain"}, "two.hand": {"queue": "hand"}},
                broker_transport_options={"visibility_timeout": 3600}, result_expires=600, worker_hijack_root_logger=False)

@app.task
def brain(prompt):
    time.sleep(%r)
    return prompt

@app.task
def hand(signal):
    start = time.time()
    time.sleep(%r)
    return start, time.time()
""" % (BRAIN, HAND)


def celery(hands, options):
    folder = Path(tempfile.mkdtemp(prefix="peer-celery-"))
    port = free_port()
    url = f"redis://127.0.0.1:{port}/0"
    (folder / "two.py").write_text(CELERY)
    environment = {**os.environ, "REDIS": url, "PYTHONPATH": str(folder)}
    fsync = "always" if options.sync == "always" else "everysec"
    redis = [options.redis_server, "--port", port, "--dir", folder, "--appendonly", "yes", "--appendfsync", fsync, "--save", ""]
    worker = [sys.executable, "-m", "celery", "-A", "two", "worker", "--loglevel", "ERROR", "--without-gossip", "--without-mingle", "--without-heartbeat"]
    commands = [redis, [*worker, "-Q", "brain", "-n", "brain", "--pool", "solo"], [*worker, "-Q", "hand", "-n", "hand", "--concurrency", hands]]
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, True)
        for command in commands:
            log = stack.enter_context(open(folder / "log", "ab"))
            process = subprocess.Popen([str(part) for part in command], cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
            stack.callback(stop, process)
            time.sleep(1)
            if process.poll() is not None:
                raise SystemExit(f"{command[0]} has ended: {(folder / 'log').read_text()[-500:]}")
        os.environ["REDIS"] = url
        sys.path.insert(0, str(folder))
        sys.modules.pop("two", None)
        import two

        request = lambda: (two.brain.s("a red apple") | two.hand.s()).apply_async().get(timeout=600)
        request()
        outcome = measure(request, hands, options)
        sys.path.remove(str(folder))
        return outcome


def stop(process):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


SYSTEMS = {"efferent": efferent, "ray serve": ray_serve, "celery": celery}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", type=Path, default=ROOT / "target/release/efferent")
    parser.add_argument("--nats-server", type=Path, default=ROOT / "target/tools/nats-server")
    parser.add_argument("--redis-server", type=Path, default=Path(shutil.which("redis-server") or "redis-server"))
    parser.add_argument("--hands", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=int, default=30, help="measured time of each figure")
    parser.add_argument("--sync", default="always", help="`always`, or what nats-server takes, such as 2m: then Redis syncs every second")
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=list(SYSTEMS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("SYSTEM", "HANDS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(SYSTEMS[options.one[0]](int(options.one[1]), options)))
        return
    runs = []
    for _ in range(options.rounds):
        for hands in options.hands:
            for system in options.systems:
                # Each in a process of its own, so that none inherits another's threads.
                command = [sys.executable, __file__, *sys.argv[1:], "--one", system, str(hands)]
                finished = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
                if finished.returncode:
                    print(f"{system}, {hands} hands: failed\n{finished.stderr[-2000:]}", file=sys.stderr)
                    continue
                run = {"system": system, "hands": hands, **json.loads(finished.stdout.strip().splitlines()[-1])}
                runs.append(run)
                print(json.dumps(run), file=sys.stderr, flush=True)
    if options.out:
        options.out.write_text(json.dumps({"cores": os.cpu_count(), "seconds": options.seconds, "sync": options.sync, "runs": runs}, indent=1))
    print("| hands | system | images/s | efficiency | overhead p50 | p99 |\n|---|---|---|---|---|---|")
    for hands in options.hands:
        for system in options.systems:
            of = [run for run in runs if (run["system"], run["hands"]) == (system, hands)]
            if of:
                rate, efficiency, p50, p99 = (statistics.median(run[key] for run in of)
                                              for key in ("images_per_second", "efficiency", "overhead_p50_ms", "overhead_p99_ms"))
                print(f"| {hands} | {system} | {rate:.2f} | {efficiency:.3f} | {p50:.1f} ms | {p99:.1f} ms |")


if __name__ == "__main__":
    main()
