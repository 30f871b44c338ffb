"""lockstep as a child of the harness: the public `LLM`, nothing else."""

from __future__ import annotations

from serve import Channel, serve, settings


def main() -> None:
    channel, run = Channel(), settings()
    from lockstep import LLM, SamplingParams
    from lockstep.version import __version__

    with LLM(
        run["model"],
        tensor_parallel_size=run["tp"],
        dtype=run["dtype"],
        max_model_len=run["max_model_len"],
        max_num_seqs=run["max_num_seqs"],
        max_num_batched_tokens=run["max_num_batched_tokens"],
        kv_cache_memory_bytes=run["kv_bytes"] // run["tp"],
        enable_prefix_caching=run["prefix_caching"],
        **run["more"],
    ) as llm:

        def generate(prompts: list[list[int]], outs: list[int]) -> list[list[int]]:
            params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False) for n in outs]
            outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
            return [list(o.outputs[0].token_ids) for o in outputs]

        serve(channel, {"version": __version__, "dtype": llm.config.model.dtype}, generate)


if __name__ == "__main__":
    main()
