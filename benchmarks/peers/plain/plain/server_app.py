"""ServerApp: federated averaging of the adapter, and a test at the end."""

import json
from pathlib import Path

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from plain.task import load_model, load_rows, test

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    model = load_model(config)
    nodes = len(list(grid.get_node_ids()))
    strategy = FedAvg(fraction_train=config["clients-per-round"] / nodes, fraction_evaluate=0.0)
    start = ArrayRecord(get_peft_model_state_dict(model))
    result = strategy.start(grid, start, num_rounds=config["rounds"])
    set_peft_model_state_dict(model, result.arrays.to_torch_state_dict())
    accuracy = test(model, config, load_rows(config, "test"))
    size = sum(t.numel() * t.element_size() for t in start.to_torch_state_dict().values())
    Path(config["result"]).write_text(json.dumps({"accuracy": accuracy, "adapter_bytes": size}))
