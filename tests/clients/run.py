"""Clients that others wrote, on a running server: the official openai client, schemathesis and
Chromium.

pip install -r tests/clients/requirements.txt      # and Debian's chromium and chromium-driver
python tests/clients/run.py target/release/bprompt [--screenshots FOLDER]
"""

import argparse
import pathlib
import re
import shutil
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
# what the document cannot say (which texts are a prompt, which ids there are) is refused all the
# same
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,"
    "response_schema_conformance,response_headers_conformance"
)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("bprompt")
    parser.add_argument("--screenshots", default=None)
    args = parser.parse_args()
    server = subprocess.Popen(
        [args.bprompt, "serve", "--port", "0", "--device", "cpu", "--request-timeout", "10"],
        stderr=subprocess.PIPE,
        text=True,
    )
    log = []
    try:
        url = None
        for line in server.stderr:
            log.append(line)
            if found := re.search(r"http://[\d.:]+", line):
                url = found[0]
                break
        assert url, "".join(log)
        # somebody has to read the log
        drain = subprocess.Popen(["cat"], stdin=server.stderr, stdout=subprocess.DEVNULL)
        subprocess.run([sys.executable, HERE / "openai_client.py", url], check=True)
        schemathesis = pathlib.Path(sys.executable).parent / "schemathesis"
        command = str(schemathesis) if schemathesis.exists() else shutil.which("schemathesis")
        subprocess.run(
            [
                command,
                "run",
                f"{url}/openapi.json",
                "--checks",
                CHECKS,
                "--max-examples",
                "60",
                "--seed",
                "1",
                "--no-color",
            ],
            check=True,
        )
        shots = [args.screenshots] if args.screenshots else []
        subprocess.run([sys.executable, HERE / "browser.py", url, *shots], check=True)
        server.terminate()
        assert server.wait(40) == 0, "the server did not end well"
        drain.wait()
    finally:
        server.kill()


main()
