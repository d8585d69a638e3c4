"""Networks: modules called as net(x, t), or net(x, t, label)."""
