"""ClientApp: train the adapter on this client's rows."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from plain.task import load_model, load_rows, train

app = ClientApp()


@app.train()
def fit(message: Message, context: Context) -> Message:
    torch.set_num_threads(1)
    config = context.run_config
    model = load_model(config)
    set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())
    rows = load_rows(config, f"client-{context.node_config['partition-id']}")
    loss = train(model, config, rows)
    content = RecordDict(
        {
            "arrays": ArrayRecord(get_peft_model_state_dict(model)),
            "metrics": MetricRecord({"loss": loss, "num-examples": len(rows)}),
        }
    )
    return Message(content, reply_to=message)
