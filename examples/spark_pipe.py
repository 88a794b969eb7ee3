"""Rewrites a text file of prompts with Spark: every partition goes through one process.

    pip install pyspark==4.3.0                # needs Java 17 or later
    python examples/spark_pipe.py --bprompt target/release/bprompt --input prompts.txt --output out
"""

import argparse
import json
import shlex

from pyspark.sql import SparkSession


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--bprompt", default="bprompt")
    p.add_argument(
        "--flags",
        default="",
        help="flags for bprompt rewrite, such as '--model DIR --min-kept 0.9'",
    )
    p.add_argument("--input", required=True)
    p.add_argument("--output", required=True)
    p.add_argument("--partitions", type=int, default=2)
    p.add_argument("--seed", type=int, default=1)
    a = p.parse_args()
    spark = SparkSession.builder.appName("bprompt").getOrCreate()
    lines = (
        spark.sparkContext.textFile(a.input)
        .filter(lambda line: line.strip())
        .repartition(a.partitions)
    )
    command = f"{shlex.quote(a.bprompt)} rewrite --input - --seed {a.seed} {a.flags}"
    # a failed process fails its task, which Spark runs again elsewhere; the seed makes it write the
    # same
    rewritten = lines.pipe(command, checkCode=True)
    rewritten.map(
        lambda line: json.dumps({k: v for k, v in json.loads(line).items() if k != "line"})
    ).saveAsTextFile(a.output)
    spark.stop()


main()
