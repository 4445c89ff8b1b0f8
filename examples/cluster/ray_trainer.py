"""One training run on two workers of Ray Train: NOT RUN, and written from Ray's pages.

Ray's `JaxTrainer` is in alpha. Its pages say that it sets jax.distributed up on workers with TPUs,
and in their newest form with GPUs; `forwax train --distributed` takes what is initialized. It then
has no parent of its own: a worker that is gone may end the others by jax's abort. Ray's
`FailureConfig` can start all again; they go on with `--resume`. Process 0 writes the folder `runs`
where it runs. The tests compile this file, and the command's own parser takes its words.

    pip install 'ray[train]' && python examples/cluster/ray_trainer.py
"""

WORDS = ["train", "digits", "--distributed"]


def train_loop_per_worker(config: dict) -> None:
    """What each worker runs: the command, in the worker's own process."""
    from forwax.lab import cli

    code = cli.main(config["words"])
    if code:
        raise RuntimeError(f"forwax ended with exit code {code}.")


def main() -> None:
    from ray.train import ScalingConfig
    from ray.train.v2.jax import JaxTrainer

    trainer = JaxTrainer(
        train_loop_per_worker,
        train_loop_config={"words": WORDS},
        scaling_config=ScalingConfig(num_workers=2, use_gpu=True),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
