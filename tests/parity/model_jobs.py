"""What the model tests run on each rank."""

import torch

from lockstep.distributed import observer, parallel_state
from lockstep.distributed.groups import ParallelGroups
from lockstep.testing import oracle


def split_model(world_size, folder):
    torch.set_num_threads(1)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world_size)
    return oracle.load_model(folder, ParallelGroups.current())


def logits(rank, world_size, folder, sequences, schedules):
    """For each schedule, the logits of every sequence (None off rank 0); then the collectives that one step enters."""
    model = split_model(world_size, folder)
    found = [oracle.run_chunks(model, sequences, chunks) for chunks in schedules]
    rows = oracle.PagedRows(model, [len(s) for s in sequences])
    entered = []

    def note(number, what):
        entered.append(what.partition(".")[2])

    observer.add(note)
    hidden = rows.step(sequences)
    in_forward = list(entered)
    model.compute_logits(hidden)
    return found, in_forward, entered[len(in_forward) :]


def greedy(rank, world_size, folder, prompts, count):
    return oracle.greedy(split_model(world_size, folder), prompts, count)
