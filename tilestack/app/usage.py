"""What `tilestack` and its commands say of themselves; imports nothing, so that help is there at once."""

TILESTACK = """usage: tilestack COMMAND [options]

  train     train a Qwen3-MoE; the same as python train.py
  explain   show, for a configuration and this machine, which kernel each op runs and why not another
  plan      what a training holds of the GPUs' memory, and which configurations fit, fastest first
  trace     run a few training steps and draw what really ran: ops, kernels, rates, a timeline
  doctor    is this machine ready to train, and what to do if it is not
  report    one page about a run: losses, speed, checkpoints, sample
  bench     time the kernels and the training step beside their rivals, on a GPU

tilestack COMMAND --help says more."""

EXPLAIN = """usage: tilestack explain [--config FILE] [--device sm_90] [--GROUP.KEY VALUE ...]

Shows what a training run with this configuration would be made of, and which kernel each op would run.

  --device NAME   ask for another machine: cpu, an NVIDIA architecture (sm_80, sm_90, ...) or an AMD one (gfx942, ...);
                  which packages are installed is still a matter of this machine
  others          the options of tilestack train"""

PLAN = """usage: tilestack plan [--model NAME] [--gpus N] [--gpu TYPE] [--json] [--config FILE] [--GROUP.KEY VALUE]

Predicts, before anything is built, what a training holds of each GPU's memory, part by part, and how long a step takes.
With a configuration (--config, or keys that say how to train) it plans that one; without, it proposes configurations
that fit, fastest first, each with the options that give it.

  --model NAME      Qwen3-30B-A3B, Qwen3-235B-A22B, or a folder or hub name with a config.json; weights are not needed;
                    default: the model of the configuration
  --layers N        in place of the model's own number
  --gpus N          how many (default: those of this machine, else 1)
  --gpu TYPE        H100, H200, A100 (80 GB), or memory as 80GB or 79.2GiB (default: those of this machine, else H100)
  --seqlen N        of proposals: tokens of a document (default 4096)
  --step-tokens N   of proposals: tokens of a step, over all GPUs (default 16,384 a GPU)
  --json            all figures, in bytes and milliseconds
  others            the options of tilestack train

examples:
  tilestack plan --model Qwen3-30B-A3B --gpus 4 --gpu H100
  tilestack plan --model Qwen3-30B-A3B --gpus 4 --gpu H200 --model.dtype bfloat16 --data.sequence_length 4096 \\
      --data.micro_batch_tokens 4096 --train.micro_batches 4 --distributed.expert_parallel 4 \\
      --model.activation_checkpointing full
  tilestack plan --config my.yaml --gpus 8

Times are of a model with rates that were measured on an H100 (docs/scaling.md), whatever --gpu is. Memory was compared
with measurements: docs/training.md says where and how close."""

TRACE = """usage: tilestack trace [--config FILE] [--compare transformers] [--steps N] [--GROUP.KEY VALUE ...]

Runs a few training steps of a configuration under torch's profiler and draws the design's picture with what really
ran: for each box of the stack its ops and who computes them, their kernels (tilestack's, cuBLAS, cuDNN, NCCL, PyTorch's
own), time, share, and the rates that they reach beside those that this device reaches for a matrix product and a copy.
Needs no GPU: on a CPU the operators of PyTorch take the place of kernels.

  --compare transformers   run plain transformers too: its untouched model on the same weights, data and optimizer
  --steps N                steps under the profiler whose means are reported (default 3); one more is thrown away
  --warmup N               steps before any other (default 3), the first compiles the kernels; then five are timed
                           without the profiler
  --out FOLDER             where trace.html and trace.json go (default: a new folder in output.folder)
  others                   the options of tilestack train

examples:
  tilestack trace                                          the preset for this machine
  tilestack trace --config my.yaml --compare transformers
  tilestack trace --data.micro_batch_tokens 8192 --model.activation_checkpointing full
  torchrun --nproc-per-node 2 --no-python tilestack trace --distributed.zero 2     the first process is traced

How to read it: shares are of the time in which the device works, so they add up to 100%; what the profile cannot place
is in a box of its own. "of ceiling" is the least time that the arithmetic or the traffic of an op allows on this
device, over the time that it took. The profiler slows the host: the time of a step without it stands beside."""

DOCTOR = """usage: tilestack doctor

Looks at what a training needs of this machine: packages and their versions, the GPU and which kernels are written for
it, the C compiler with which Triton makes its launchers, DeepSpeed, memory and disk; runs one kernel. Changes nothing.
Exits with 0 if a training can start here, with 1 if something must be mended first."""

REPORT = """usage: tilestack report RUN [--out FILE]

Writes one page about a run that is under way or done: its losses, speed, memory, checkpoints, configuration and sample,
in a single HTML file that needs nothing from elsewhere.

  RUN          the folder of a run, or 'latest' for the newest one in runs/
  --out FILE   where the page goes (default: report.html in the run's folder)"""

COMMANDS = {"explain": EXPLAIN, "plan": PLAN, "trace": TRACE, "doctor": DOCTOR, "report": REPORT}
