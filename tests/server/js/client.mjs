// OpenAI's JavaScript client against a server. Prints a JSON line per scenario: {"name", "ok", "error"}.
// Arguments: the server's address, its key, and what offline inference writes after PROMPT.

import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { join } from "node:path";

const { OpenAI } = createRequire(join(process.env.CLIENT_FOLDER, "package.json"))("openai");
const [url, apiKey, expected] = process.argv.slice(2);
const settings = { baseURL: `${url}/v1`, apiKey, maxRetries: 0, timeout: 60_000 };
const client = new OpenAI(settings);
const model = "lockstep-demo";
const prompt = "def fibonacci(n):";
const messages = [{ role: "user", content: "Write a loop." }];
const short = { model, temperature: 0, max_tokens: 10 };

const schema = {
  type: "object",
  properties: { city: { enum: ["Rome", "Oslo"] }, days: { enum: [1, 2, 3] } },
  required: ["city", "days"],
  additionalProperties: false,
};
const tools = [{ type: "function", function: { name: "weather", description: "The weather of a city", parameters: schema } }];

function isForecast(value) {
  assert.deepEqual(Object.keys(value).sort(), ["city", "days"]);
  assert.ok(schema.properties.city.enum.includes(value.city) && schema.properties.days.enum.includes(value.days));
}

async function until(check, seconds = 20) {
  const end = Date.now() + seconds * 1000;
  while (!(await check())) {
    assert.ok(Date.now() < end, "it did not become true");
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}

async function load() {
  return (await fetch(`${url}/load`, { headers: { Authorization: `Bearer ${apiKey}` } })).json();
}

const scenarios = {
  async models() {
    const ids = [];
    for await (const one of client.models.list()) ids.push(one.id);
    assert.deepEqual(ids, [model]);
    assert.equal((await client.models.retrieve(model)).owned_by, "lockstep");
  },

  async completions() {
    const found = await client.completions.create({ ...short, prompt, logprobs: 2 });
    assert.equal(found.choices[0].text, expected);
    assert.equal(found.usage.completion_tokens, 10);
    assert.equal(found.choices[0].logprobs.token_logprobs.length, 10);
    let text = "";
    for await (const chunk of await client.completions.create({ ...short, prompt, stream: true })) text += chunk.choices[0].text;
    assert.equal(text, expected);
  },

  async chat() {
    const whole = await client.chat.completions.create({ ...short, messages });
    const stream = await client.chat.completions.create({ ...short, messages, stream: true, stream_options: { include_usage: true } });
    let text = "";
    let last;
    for await (const chunk of stream) {
      text += chunk.choices[0]?.delta.content ?? "";
      last = chunk;
    }
    assert.equal(text, whole.choices[0].message.content);
    assert.deepEqual(last.choices, []);
    assert.equal(last.usage.completion_tokens, whole.usage.completion_tokens);
    const helper = client.chat.completions.stream({ ...short, messages });
    assert.equal(await helper.finalContent(), text);
  },

  async tools() {
    const chosen = { type: "function", function: { name: "weather" } };
    for (const tool_choice of [chosen, "required"]) {
      const asked = { ...short, max_tokens: 400, parallel_tool_calls: false, messages, tools, tool_choice };
      const [call, ...others] = (await client.chat.completions.create(asked)).choices[0].message.tool_calls;
      assert.equal(call.function.name, "weather");
      for (const one of [call, ...others]) isForecast(JSON.parse(one.function.arguments));
      const streamed = (await client.chat.completions.stream(asked).finalChatCompletion()).choices[0].message.tool_calls;
      assert.deepEqual(streamed[0].function.arguments, call.function.arguments);
    }
  },

  async structured() {
    const response_format = { type: "json_schema", json_schema: { name: "forecast", strict: true, schema } };
    const parsed = await client.chat.completions.parse({ ...short, max_tokens: 400, messages, response_format });
    isForecast(parsed.choices[0].message.parsed);
    const found = await client.responses.create({
      model,
      input: "Write a loop.",
      max_output_tokens: 400,
      text: { format: { type: "json_schema", name: "forecast", strict: true, schema } },
    });
    isForecast(JSON.parse(found.output_text));
  },

  async embeddings() {
    const found = await client.embeddings.create({ model, input: ["import os", "def f():"] });
    assert.equal(found.data.length, 2);
    for (const { embedding } of found.data) assert.ok(Math.abs(Math.hypot(...embedding) - 1) < 1e-5);
  },

  async errors() {
    const wrong = await client.chat.completions.create({ ...short, messages, temperature: -1 }).catch((e) => e);
    assert.ok(wrong instanceof OpenAI.BadRequestError);
    assert.deepEqual([wrong.param, wrong.type], ["temperature", "invalid_request_error"]);
    const missing = await client.completions.create({ model: "gpt-4", prompt }).catch((e) => e);
    assert.ok(missing instanceof OpenAI.NotFoundError);
    assert.equal(missing.code, "model_not_found");
    const stranger = await new OpenAI({ ...settings, apiKey: "no" }).models.list().catch((e) => e);
    assert.ok(stranger instanceof OpenAI.AuthenticationError);
  },

  async abort() {
    const long = { ...short, prompt, max_tokens: 1900, stream: true, ignore_eos: true };
    const stream = await client.completions.create(long);
    for await (const _ of stream) break; // leaving the loop hangs up
    const control = new AbortController();
    const waiting = client.completions.create({ ...long, stream: false }, { signal: control.signal }).catch((e) => e);
    await until(async () => (await load()).running > 0);
    control.abort();
    assert.ok((await waiting) instanceof OpenAI.APIUserAbortError);
    await until(async () => {
      const now = await load();
      return now.running + now.waiting === 0 && now.kv_cache_usage === 0;
    });
  },
};

for (const [name, scenario] of Object.entries(scenarios)) {
  const result = await scenario().then(
    () => ({ name, ok: true, error: null }),
    (e) => ({ name, ok: false, error: e.stack }),
  );
  console.log(JSON.stringify(result));
}
