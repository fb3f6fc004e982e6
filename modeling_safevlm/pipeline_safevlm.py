"""The `image-text-to-text` pipeline with the verdict beside the answer."""

from transformers import ImageTextToTextPipeline


class SafeVlmPipeline(ImageTextToTextPipeline):
    """
    As the stock pipeline; each result also has `"safety"`: action, category, level, score and probabilities. Under the
    policy `"off"` its action is `"off"`. A new answer begins without white space.

    A per-call policy is the argument `safety_policy`, as in `generate`.
    """

    def check_model_type(self, supported_models):
        """Any SafeVLM will do; its class is not in transformers' own list."""

    def save_pretrained(self, save_directory, **kwargs):
        """With the processor, which transformers' pipelines leave out."""
        super().save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)

    def _sanitize_parameters(self, safety_policy=None, generate_kwargs=None, **kwargs):
        if safety_policy is not None:
            if generate_kwargs is not None and "safety_policy" in generate_kwargs:
                raise ValueError("`safety_policy` is given twice: once more in `generate_kwargs`. Keep one.")
            generate_kwargs = {**(generate_kwargs or {}), "safety_policy": safety_policy}
        return super()._sanitize_parameters(generate_kwargs=generate_kwargs, **kwargs)

    def preprocess(self, inputs=None, timeout=None, **kwargs):
        if isinstance(inputs, dict) and "images" in inputs:
            inputs = {**inputs, "images": self.processor.load_pictures(inputs["images"], timeout)}
        return super().preprocess(inputs, timeout=timeout, **kwargs)

    def _forward(self, model_inputs, generate_kwargs=None):
        generate_kwargs = dict(generate_kwargs or {}, return_dict_in_generate=True)
        generate_kwargs.setdefault("tokenizer", self.processor.tokenizer)
        prompt_text = model_inputs.pop("text")
        input_ids = model_inputs["input_ids"]
        generate_kwargs = self._prepare_generate_kwargs(generate_kwargs)
        output = self.model.generate(**model_inputs, **generate_kwargs)
        return {
            # One entry per prompt: several with `num_return_sequences`, which `batch_size` must not tear apart.
            "generated_sequence": output.sequences.reshape(len(input_ids), -1, output.sequences.shape[-1]),
            "prompt_text": prompt_text,
            "input_ids": input_ids,
            "safety": output["safety"].to_list(),
        }

    def postprocess(self, model_outputs, *args, **kwargs):
        safety = model_outputs.pop("safety")
        if isinstance(safety, dict):  # with `batch_size` the pipeline hands over one item of the batch
            safety = [safety]
        records = super().postprocess(model_outputs, *args, **kwargs)
        for i, record in enumerate(records):  # several records per row with `num_return_sequences`
            record["safety"] = dict(safety[i * len(safety) // len(records)])
            self._strip(record)
        return records

    def _strip(self, record):
        """Templates end before the space that comes before an answer; what continues a text keeps it."""
        written, asked = record.get("generated_text"), record["input_text"]
        if isinstance(written, str) and not isinstance(asked, str) and asked[-1]["role"] != "assistant":
            record["generated_text"] = written.lstrip()
        elif isinstance(written, list) and len(written) > len(asked) and isinstance(written[-1].get("content"), str):
            written[-1]["content"] = written[-1]["content"].lstrip()
