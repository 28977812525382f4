#!/usr/bin/env python3
"""The recipe of qwen3next-kjv: a small, real Qwen3-Next trained on the King James Bible, on a CPU.

    apt install bible-kjv                      # the text, public domain (pulls in bible-kjv-text)
    pip install torch transformers tokenizers safetensors numpy gguf
    python3 train.py data  work/               # text, held-out text, tokenizer, token arrays
    python3 train.py train work/ --minutes 52  # work/ckpt.pt every few minutes, work/hf at the end
    python3 train.py gguf  work/               # writes work/qwen3next-kjv-q8_0.gguf from work/hf

The schedule runs by the clock, so weights differ from run to run and machine to machine; everything else is seeded.
The delta rule and the experts are replaced while training by faster equivalents (below); the weights that come out
load into the unmodified Qwen3NextForCausalLM, with which all figures in README.md were taken.
"""
import argparse, itertools, json, math, os, re, subprocess, time
os.environ.setdefault("HF_HUB_OFFLINE", "1")
import numpy as np

VOCAB, EOT = 320, "<|endoftext|>"
QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
         r"|\s+(?!\S)|\s+")
CONFIG = dict(
    vocab_size=VOCAB, hidden_size=192, intermediate_size=384, num_hidden_layers=4, full_attention_interval=4,
    num_attention_heads=4, num_key_value_heads=2, head_dim=64, partial_rotary_factor=0.25, rope_theta=10000.0,
    linear_conv_kernel_dim=4, linear_key_head_dim=32, linear_value_head_dim=32, linear_num_key_heads=4,
    linear_num_value_heads=8, num_experts=16, num_experts_per_tok=4, moe_intermediate_size=96,
    shared_expert_intermediate_size=96, norm_topk_prob=True, router_aux_loss_coef=0.01, rms_norm_eps=1e-6,
    max_position_embeddings=4096, tie_word_embeddings=False, eos_token_id=VOCAB - 1, bos_token_id=None,
    initializer_range=0.04)


# ---------------------------------------------------------------- data
def data(work):
    """One verse a line, an empty line between chapters, EOT between books. The last ~2 % is held out."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    raw = subprocess.run(["bible", "-f", "ge1:1-rev22:21"], capture_output=True, text=True, check=True).stdout
    books = []
    for line in raw.splitlines():
        book, chapter, text = re.match(r"(\S+?)(\d+):\d+ (.*)$", line).groups()
        if not books or books[-1][0] != book: books.append((book, []))
        chapters = books[-1][1]
        if not chapters or chapters[-1][0] != chapter: chapters.append((chapter, []))
        chapters[-1][1].append(text.strip())
    books = [["\n".join(v) + "\n" for _, v in ch] for _, ch in books]
    total, held = sum(len(c) for b in books for c in b), []
    while sum(map(len, held)) < 0.02 * total:              # whole chapters, from the end
        if not books[-1]: books.pop()
        held.insert(0, books[-1].pop())
    books = [b for b in books if b]
    texts = ["\n".join(b) for b in books]
    heldout = "\n".join(held)                              # book ends are not marked in the held-out text
    open(f"{work}/heldout.txt", "w").write(heldout)

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN2), behavior="isolated", invert=False),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=VOCAB - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    assert tok.add_special_tokens([EOT]) == 1 and tok.token_to_id(EOT) == VOCAB - 1
    tok.save(f"{work}/tokenizer.json")
    ids = list(itertools.chain.from_iterable(tok.encode(t).ids + [VOCAB - 1] for t in texts))
    np.save(f"{work}/train.npy", np.array(ids, dtype=np.uint16))
    np.save(f"{work}/heldout.npy", np.array(tok.encode(heldout).ids, dtype=np.uint16))
    print(f"train {sum(map(len, texts))} chars, {len(ids)} tokens; held out {len(heldout)} chars")


# ---------------------------------------------------------------- faster equivalents, for training only
def fast_delta_rule(query, key, value, g, beta, chunk_size=32, **_):
    """torch_chunk_gated_delta_rule without in-place writes, for sequences of whole chunks and no initial state."""
    import torch
    import torch.nn.functional as F
    b, t, hk, dk = key.shape
    hv, dv = value.shape[-2:]
    r, n, c = hv // hk, t // chunk_size, chunk_size
    query, key = (x.float() * torch.rsqrt(x.float().square().sum(-1, keepdim=True) + 1e-6) for x in (query, key))
    # [b, hk, n, c, d] for q and k, [b, hk, r, n, c, d] for the rest
    q, k = (x.reshape(b, n, c, hk, dk).permute(0, 3, 1, 2, 4).contiguous() for x in (query * dk ** -0.5, key))
    kk, qk = k @ k.mT, q @ k.mT
    q, k, kk, qk = (x[:, :, None] for x in (q, k, kk, qk))
    v = value.float().reshape(b, n, c, hk, r, dv).permute(0, 3, 4, 1, 2, 5)
    beta = beta.float().reshape(b, n, c, hk, r).permute(0, 3, 4, 1, 2)[..., None]
    cum = g.reshape(b, n, c, hk, r).permute(0, 3, 4, 1, 2).cumsum(-1)
    upper = torch.ones(c, c, dtype=torch.bool).triu(1)
    decay = (cum[..., :, None] - cum[..., None, :]).masked_fill(upper, float("-inf")).exp()
    a = kk * decay * beta
    rhs = torch.cat([v * beta, k * (beta * cum.exp()[..., None])], -1)
    sol = torch.linalg.solve_triangular(a, rhs, upper=False, unitriangular=True)
    u, w = sol.split([dv, dk], -1)
    qk, q = qk * decay, q * cum.exp()[..., None]
    k = k * (cum[..., -1:] - cum).exp()[..., None]
    last = cum[..., -1].exp()[..., None, None]
    state, out = u.new_zeros(b, hk, r, dk, dv), []
    for i in range(n):
        v_new = u[:, :, :, i] - w[:, :, :, i] @ state
        out.append(q[:, :, :, i] @ state + qk[:, :, :, i] @ v_new)
        state = state * last[:, :, :, i] + k[:, :, :, i].mT @ v_new
    out = torch.stack(out, 3).permute(0, 3, 4, 1, 2, 5).reshape(b, t, hv, dv)
    return out, None


def fast_experts(self, x, index, weights):
    """Tokens sorted by expert, one pair of products an expert."""
    import torch
    import torch.nn.functional as F
    k = index.shape[1]
    flat = index.reshape(-1)
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=self.num_experts).tolist()
    xs = x[order // k].split(counts)
    ys = []
    for e, xe in enumerate(xs):
        gate, up = F.linear(xe, self.gate_up_proj[e]).chunk(2, -1)
        ys.append(F.linear(F.silu(gate) * up, self.down_proj[e]))
    y = torch.cat(ys)[order.argsort()].view(*index.shape, -1)
    return (y * weights[..., None]).sum(1)


# ---------------------------------------------------------------- training
def build(seed):
    import torch
    import transformers.models.qwen3_next.modeling_qwen3_next as m
    m.torch_chunk_gated_delta_rule = fast_delta_rule
    m.Qwen3NextExperts.forward = fast_experts
    torch.manual_seed(seed)
    model = m.Qwen3NextForCausalLM(m.Qwen3NextConfig(**CONFIG))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("A_log"): p.uniform_(1, 8).log_()
            if name.endswith("dt_bias"):                       # softplus(dt_bias) log-uniform in [0.002, 0.2]
                dt = torch.exp(torch.rand_like(p) * math.log(100) + math.log(0.002))
                p.copy_(dt + torch.log(-torch.expm1(-dt)))
            if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj", "down_proj.weight")):
                p.mul_(1 / math.sqrt(2 * CONFIG["num_hidden_layers"]))
    return model


def held_out_nll(model, ids, ctx=512, batch=4):
    """Mean NLL a token over non-overlapping windows, every position but a window's first scored."""
    import torch
    import torch.nn.functional as F
    n = len(ids) // ctx
    windows = torch.from_numpy(ids[:n * ctx].astype(np.int64)).view(n, ctx)
    total = 0.0
    with torch.no_grad():
        for w in windows.split(batch):
            logits = model(input_ids=w, use_cache=False).logits.float()
            total += F.cross_entropy(logits[:, :-1].flatten(0, 1), w[:, 1:].flatten(), reduction="sum").item()
    return total / (n * (ctx - 1))


def train(rank, procs, work, minutes, seed=1, ctx=512, batch=4, lr=2.5e-3):
    """One of `procs` processes with one thread each; they share every batch and average gradients once a step."""
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{os.path.abspath(work)}/rendezvous", rank=rank, world_size=procs)
    say = (lambda *a: print(*a, flush=True)) if rank == 0 else (lambda *a: None)
    model = build(seed)
    params = list(model.parameters())
    ids = torch.from_numpy(np.load(f"{work}/train.npy").astype(np.int64))
    held = np.load(f"{work}/heldout.npy")
    decay = [p for n, p in model.named_parameters() if p.ndim >= 2 and "conv1d" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim < 2 or "conv1d" in n]
    opt = torch.optim.AdamW([dict(params=decay, weight_decay=0.1), dict(params=rest, weight_decay=0.0)],
                            lr=lr, betas=(0.9, 0.95), fused=True)
    rng, starts, step, seen = np.random.default_rng(seed), [], 0, 0
    t0 = last = saved = time.time()
    say(f"{sum(p.numel() for p in params)} parameters, {len(ids)} tokens")
    while True:
        clock = torch.tensor([time.time() - t0])
        dist.broadcast(clock, 0)                               # one clock, so that all stop at the same step
        if (progress := clock.item() / (60 * minutes)) >= 1: break
        if len(starts) < batch:                                # a new epoch: all windows, shifted by a random offset
            starts = list(rng.permutation(np.arange(rng.integers(ctx), len(ids) - ctx - 1, ctx)))
        x = torch.stack([ids[s:s + ctx + 1] for s in [starts.pop() for _ in range(batch)][rank::procs]])
        for group in opt.param_groups:                         # warm-up, then cosine to 2 %, by the clock
            group["lr"] = lr * min(1, (step + 1) / 100) * (0.02 + 0.49 * (1 + math.cos(math.pi * progress)))
        out = model(input_ids=x[:, :-1], use_cache=False, output_router_logits=True)
        loss = F.cross_entropy(out.logits.flatten(0, 1), x[:, 1:].flatten())
        total = loss + CONFIG["router_aux_loss_coef"] * out.aux_loss
        opt.zero_grad(set_to_none=True)
        total.backward()
        grads = torch.cat([p.grad.flatten() for p in params])
        dist.all_reduce(grads)
        for p, g in zip(params, grads.div_(procs).split([p.numel() for p in params])): p.grad = g.view_as(p)
        norm = torch.nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()
        step, seen = step + 1, seen + batch * ctx
        if step <= 5 or step % 50 == 0:
            now = time.time()
            say(f"step {step} {100 * progress:.1f}% loss {loss.item():.4f} aux {out.aux_loss.item():.3f} "
                  f"norm {norm:.2f} epoch {seen / len(ids):.2f} {seen / (now - t0):.0f} tokens/s")
        if rank == 0 and time.time() - saved > 240:
            torch.save(model.state_dict(), f"{work}/ckpt.pt.tmp")
            os.replace(f"{work}/ckpt.pt.tmp", f"{work}/ckpt.pt")
            nll = held_out_nll(model, held[:8192])
            say(f"  held-out (start) nll {nll:.4f} ppl {math.exp(nll):.3f}")
            saved = time.time()
    if rank: return
    model.save_pretrained(f"{work}/hf")
    nll = held_out_nll(model, held)
    json.dump(dict(steps=step, tokens=seen, minutes=(time.time() - t0) / 60, processes=procs, held_out_ppl=math.exp(nll)),
              open(f"{work}/training.json", "w"), indent=1)
    say(f"done: {step} steps, {seen} tokens, held-out nll {nll:.4f} ppl {math.exp(nll):.4f}")


# ---------------------------------------------------------------- export
def export(work):
    """work/hf as one Q8_0 GGUF: matrices whose rows are whole blocks of 32, the router aside; the rest float32."""
    import shutil, sys
    sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../verify/golden"))
    from hf_to_gguf import write_gguf
    shutil.copy(f"{work}/tokenizer.json", f"{work}/hf/tokenizer.json")
    write_gguf(f"{work}/qwen3next-kjv-q8_0.gguf", f"{work}/hf", "qwen3next-kjv", quant="q8_0")


if __name__ == "__main__":
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("step", choices=["data", "train", "gguf"])
    ap.add_argument("work")
    ap.add_argument("--minutes", type=float, default=60)
    ap.add_argument("--procs", type=int, default=os.cpu_count())
    a = ap.parse_args()
    if a.step == "data": os.makedirs(a.work, exist_ok=True); data(a.work)
    if a.step == "gguf": export(a.work)
    if a.step == "train":
        import torch.multiprocessing as mp
        if os.path.exists(f"{a.work}/rendezvous"): os.remove(f"{a.work}/rendezvous")
        mp.spawn(train, (a.procs, a.work, a.minutes), a.procs)
