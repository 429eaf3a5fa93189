"""Helpers that two or more test files share. Index, by what a test needs:

Models and data
    tiny_models       small random models of every kind, and prompts for them
    sharded_checkpoint  a folder as authors publish one: shards, byte-level BPE, chat template,
                      generation config; use the fixture of the same name
    golden_models     models and inputs that are the same to the bit everywhere (golden logits)
    mamba_layers      one Mamba-2 layer of transformers, for tests of operators
    evaluation        small tasks, requests and evaluations; the folder of real data

Expected values
    reference         attention from its formula, in float64; imports nothing of the package
    tolerance         the tolerances and comparisons: use these, never a number of a test's own
    golden_bits       compare digests of bits with golden/bits, or skip and say what differs
    golden_extension  compare with files in golden/, and say which side moved
    golden_runner     a runner on the inputs of the golden logits

Pages, tables and masks
    strategies        generated histories of a pool, and checks of masks and of attention's output
    allocator_model   AllocatorModel: an allocator checked against lists of tokens; its state
                      machine and random walk
    cache_steps       a PagedCache without a model, and steps that write nothing
    paged_case        ragged sequences in a pool on a GPU, with the error of attention over them

Runners and engines
    driver            Driver: a real runner with an allocator; use it to test a runner
    recording_runner  RecordingRunner: computes nothing and records calls; use it to test benchmarks
    simulated_runner  SimulatedRunner: pages hold token ids, so that a wrong page is a wrong answer;
                      oracles, which compute the expected logits
    output_setting    Setting: an output processor between fakes; use it to test outputs
    engine_harness    EngineHarness: an engine with every invariant checked after each step; use it
                      to test scheduling. random_walk: random requests on one
    exact_bits        ExactHarness: the same for bits, in exact mode; Alone: requests by themselves;
                      generated_logits: of generate() under paged()
    traffic           random requests, faults and early ends on the embedded model, from a pool of
                      requests with known answers
    soak              traffic for a long time, with memory that must be flat: `nox -s soak`
    deep_states       DeepStates: counts preemptions, resumptions and forks under pressure
    fairness          FairnessWatch: checks that each wait keeps to the bound that follows from rank
    words             Words: a tokenizer whose word for token 7 is "w7"; it fails when asked to

Commands
    command_line      every command, and checks of what one prints
    killed            kill_soon: a command that is killed while it works
    noxfile           sessions of noxfile.py, without nox
    batch_files       files of requests for `granite-paged batch`, and their answers

Faults
    faults            bugs of paging injected on purpose; a new check must detect one
    call_sites        every call that a step makes, and a fault at each
    fast_interpreter  Triton's interpreter without most of its searches, for all tests
    compile_kernels   a program that compiles every Triton kernel for a GPU that is not present
"""
