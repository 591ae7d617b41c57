import assert from "node:assert/strict";
import { test } from "node:test";
import { answerStats, chatReducer, conversation, emptyChat, isStreaming, type ChatAction } from "../src/lib/chat.ts";
import { readChunk } from "../src/lib/completions.ts";

const reduce = (...actions: ChatAction[]) => actions.reduce(chatReducer, emptyChat);
const ask = (question: string, now = 0): ChatAction => ({ type: "ask", question, model: "m", now });
const delta = (text: string, now = 0): ChatAction => ({ type: "delta", text, now });
const chunk = (delta: object, rest: object = {}) => JSON.stringify({ choices: [{ index: 0, delta, ...rest }] });

test("an answer grows and ends; the next question carries the conversation", () => {
  const state = reduce(ask("one"), delta("a"), delta("b"), { type: "end" }, ask("two"));
  assert.equal(isStreaming(state), true);
  assert.deepEqual(conversation(state), [
    { role: "user", content: "one" },
    { role: "assistant", content: "ab" },
    { role: "user", content: "two" },
  ]);
});

test("what arrives after the end of an answer changes nothing", () => {
  const stopped = reduce(ask("one"), delta("a"), { type: "stop" });
  assert.equal(stopped.turns[0]?.answer.state, "stopped");
  assert.equal([delta("late"), { type: "fail", message: "x" } as ChatAction].reduce(chatReducer, stopped), stopped);
});

test("a turn without any text is left out of what is sent, so that roles alternate", () => {
  const state = reduce(ask("one"), { type: "fail", message: "down" }, ask("two"), delta("half"), { type: "stop" }, ask("three"));
  assert.deepEqual(
    conversation(state).map((message) => message.content),
    ["two", "half", "three"],
  );
});

test("trying again replaces the answer and sends the same question", () => {
  const state = chatReducer(reduce(ask("one"), delta("x"), { type: "fail", message: "lost" }), { type: "retry", model: "n", now: 3 });
  assert.deepEqual(conversation(state), [{ role: "user", content: "one" }]);
  assert.equal(state.turns[0]?.answer.text, "");
  assert.equal(state.turns[0]?.answer.model, "n");
});

test("the rate counts the tokens after the first, by the server's count where it gives one", () => {
  const state = reduce(ask("one", 1000), delta("a", 1500), delta("b", 1750), delta("c", 2500));
  const timing = state.turns[0]!.answer.timing;
  assert.deepEqual(answerStats(timing), { timeToFirst: 0.5, tokens: 3, tokensPerSecond: 2 });
  assert.deepEqual(answerStats({ ...timing, tokens: 11 }), { timeToFirst: 0.5, tokens: 11, tokensPerSecond: 10 });
});

test("no rate is made up from one token", () => {
  const one = reduce(ask("one", 0), delta("a", 10)).turns[0]!.answer.timing;
  assert.deepEqual(answerStats(one), { timeToFirst: 0.01, tokens: 1, tokensPerSecond: null });
  const none = reduce(ask("one", 0)).turns[0]!.answer.timing;
  assert.equal(answerStats(none).timeToFirst, null);
});

test("chunks of the stream are read into text, usage, finish, error and end", () => {
  assert.deepEqual(readChunk(chunk({ role: "assistant", content: "" })), []);
  assert.deepEqual(readChunk(chunk({ content: "hi" })), [{ type: "text", text: "hi" }]);
  assert.deepEqual(readChunk(chunk({}, { finish_reason: "length" })), [{ type: "finish", reason: "length" }]);
  assert.deepEqual(readChunk('{"choices":[],"usage":{"completion_tokens":4}}'), [{ type: "usage", tokens: 4 }]);
  assert.deepEqual(readChunk('{"error":{"message":"node lost"}}'), [{ type: "error", message: "node lost" }]);
  assert.deepEqual(readChunk("[DONE]"), [{ type: "end" }]);
});

test("a line that is not the format ends the answer with a reason and never throws", () => {
  for (const line of ["", "{", "null", "7"]) assert.equal(readChunk(line)[0]?.type, "error", line);
  assert.deepEqual(readChunk('{"error":null}'), [{ type: "error", message: "The answer failed." }]);
});
