"""Train a UNet on handwritten digits, then turn noise into new ones.

    python examples/digits.py --steps 2000 --out digits.png

Two to three minutes on a CPU; a GPU is used where there is one. `sdeflow demo` does the same with
checkpoints, resuming, mixed precision, several solvers and a measure of how good the digits are.
"""

import argparse

import torch
from PIL import Image
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, RandomSampler

from sdeflow import Cosine, Denoiser, get, probability_flow, sample, score_matching

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=2000, help="of training, at least 10")
parser.add_argument("--out", default="digits.png", help="where to write the picture")
args = parser.parse_args()

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
sde, dataset = Cosine(), get("dataset", "digits")
net = get("network", "unet", shape=dataset.shape).to(device)
denoiser = Denoiser(net, sde, prediction="v")

# ---- train: the gradient of score_matching, and a moving average of the weights

optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
decay = min(0.998, 1 - 10 / args.steps)  # a short run forgets its random start sooner
average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(decay))
draws = RandomSampler(dataset, replacement=True, num_samples=64 * args.steps)
for step, x0 in enumerate(DataLoader(dataset, batch_size=64, sampler=draws), 1):
    loss = score_matching(denoiser, x0.to(device), weighting="prediction")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    average.update_parameters(net)
    if step == 1 or step % max(1, args.steps // 10) == 0:
        print(f"step {step:5d}   loss {loss.item():.3f}", flush=True)

# ---- sample: the probability flow of the average, from noise to digits

flow = probability_flow(sde, Denoiser(average.eval(), sde, prediction="v"))
run = sample(flow, (64, *dataset.shape), solver="dpmpp_2m", steps=20, seed=0, device=device)
print(run)

# ---- draw: 8 rows of 8 digits, with a margin, dark on light

tiles = torch.nn.functional.pad(run.x.cpu(), (1, 1, 1, 1), value=-1).clamp(-1, 1)
ink = tiles.reshape(8, 8, 10, 10).transpose(1, 2).reshape(80, 80)
picture = Image.fromarray(((1 - ink) * 127.5).byte().numpy())
picture.resize((640, 640), Image.Resampling.NEAREST).save(args.out)
print(args.out)
