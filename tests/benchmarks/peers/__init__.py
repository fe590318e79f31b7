"""Thaw's two phases as users of other libraries write them: what Thaw's trainer is timed against.

    python -m tests.benchmarks.peers PEER --data DIR --split CSV --weights FILE [...]

`python -m tests.benchmarks.against_peers` starts each in a fresh process and compares. The peers
live in an environment of their own, which borrows torch, torchvision, timm, numpy and Pillow from
Thaw's instead of another 6 GB of the same (run at the root of the repository, with the Python that
`.venv` was made with):

    python3.11 -m venv /tmp/peers-venv
    echo "$PWD/.venv/lib/python3.11/site-packages" \\
        > /tmp/peers-venv/lib/python3.11/site-packages/thaw.pth
    /tmp/peers-venv/bin/pip install --no-deps -r tests/benchmarks/peers/requirements.txt

| file | what happens in it |
| --- | --- |
| job.py | what is asked of a peer and what it reports; imports no framework |
| torch_parts.py | network, photos and loaders of the peers that run on torch |
| all others | one peer each: `run(job, report)` |
"""
