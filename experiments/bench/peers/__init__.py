"""Other people's buffers behind one small interface, so that the buffer benchmark can run them beside jaxcl's.

Peers are optional; nothing of theirs is copied here. One environment can hold them all (Python 3.11):

    pip install jax==0.10.2 flashbax==0.1.3 brax==0.14.2 torch==2.13.0

Mammoth and Avalanche are read from a checkout (`--path`); their torchvision is not needed. Each peer runs by itself, for as
many seconds as it is told:

    echo 2.0 | python -m experiments.bench.peers.jax_peers --peer=flashbax --capacity=32768
"""
