"""A thousand open connections for a minute, half of them dropped in the middle of a stream; then
SIGTERM under load.

python tests/clients/connections.py target/release/bprompt [--seconds 60] [--connections 1000]
"""

import argparse
import asyncio
import json
import random
import re
import resource
import signal
import subprocess
import time


def memory(pid):
    with open(f"/proc/{pid}/status") as f:
        return int(re.search(r"VmRSS:\s+(\d+)", f.read())[1]) / 1024


async def request(host, port, body, drop):
    """Sends a request for a stream; true if it came whole, or was to be dropped."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        data = json.dumps(body).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        writer.write(head.encode() + data)
        if drop:
            # gone in the middle of the stream, or before it begins
            await reader.read(random.choice([1, 400, 2000]))
            writer.transport.abort()
            return True
        text = await reader.read(-1)
        return (
            text.startswith(b"HTTP/1.1 200") and b"data: [DONE]" in text and b'"error"' not in text
        )
    finally:
        writer.close()


async def metrics(host, port):
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    text = (await reader.read(-1)).decode()
    writer.close()
    return {m[1]: float(m[2]) for m in re.finditer(r"^(vllm:\w+)\{[^}]*\} (\S+)$", text, re.M)}


def start(bprompt):
    command = [
        bprompt,
        "serve",
        "--port",
        "0",
        "--device",
        "cpu",
        "--max-queue",
        "4096",
        "--request-timeout",
        "0",
        "--shutdown-timeout",
        "120",
    ]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    line = next(line for line in server.stderr if "http://" in line)
    # somebody has to read the log
    subprocess.Popen(["cat"], stdin=server.stderr, stdout=subprocess.DEVNULL)
    host, port = re.search(r"http://([\d.]+):(\d+)", line).groups()
    return server, host, int(port)


async def crowd(args, server, host, port):
    whole = dropped = failed = 0
    samples, end = [], time.time() + args.seconds
    random.seed(1)

    async def client(i):
        nonlocal whole, dropped, failed
        while time.time() < end:
            body = {
                "prompt": f"a cat and {i} dogs in the rain, ",
                "max_tokens": 32,
                "ignore_eos": True,
                "stream": True,
                "seed": i,
            }
            drop = i % 2 == 1
            try:
                ok = await request(host, port, body, drop)
            except OSError:
                ok = False
            failed += not ok
            whole += ok and not drop
            dropped += ok and drop

    async def watch():
        while time.time() < end:
            samples.append(memory(server.pid))
            await asyncio.sleep(args.seconds / 12)

    await asyncio.gather(watch(), *(client(i) for i in range(args.connections)))
    for _ in range(100):
        left = await metrics(host, port)
        if (
            left["vllm:num_requests_running"]
            + left["vllm:num_requests_waiting"]
            + left["vllm:kv_cache_usage_perc"]
            == 0
        ):
            break
        await asyncio.sleep(0.1)
    print(
        f"{args.connections} connections, {args.seconds} s: "
        f"{whole} whole, {dropped} dropped, {failed} failed"
    )
    print(
        f"memory (MB) over time: {' '.join(f'{s:.0f}' for s in samples)}; "
        f"blocks held at the end: {left['vllm:kv_cache_usage_perc']}"
    )
    assert (
        failed == 0
        and left["vllm:kv_cache_usage_perc"] == 0
        and left["vllm:num_requests_running"] == 0
    )
    late = samples[len(samples) // 2 :]
    assert max(late) < 1.1 * min(late) + 20, "memory grows"


async def terminate(server, host, port, count):
    body = {"prompt": "a castle", "max_tokens": 100, "ignore_eos": True, "stream": True}
    tasks = [asyncio.create_task(request(host, port, body, False)) for _ in range(count)]
    await asyncio.sleep(0.5)
    server.send_signal(signal.SIGTERM)
    answered = sum(await asyncio.gather(*tasks))
    status = server.wait(130)
    print(
        f"SIGTERM under load: {answered} of {count} accepted requests answered whole, "
        f"exit status {status}"
    )
    assert answered == count and status == 0


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("bprompt")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--connections", type=int, default=1000)
    args = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 8192), most))
    server, host, port = start(args.bprompt)
    try:
        asyncio.run(crowd(args, server, host, port))
        asyncio.run(terminate(server, host, port, 200))
    finally:
        server.kill()


main()
