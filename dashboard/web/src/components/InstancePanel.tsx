import type { FeedState } from "../lib/feed.ts";
import { fraction, plural } from "../lib/format.ts";
import { layerCount, nodeName } from "../lib/swarm.ts";
import type { Instance, InstanceState, Swarm } from "../types.ts";
import { LayerStrip } from "./LayerStrip.tsx";
import { Pipeline } from "./Pipeline.tsx";
import { Progress } from "./Progress.tsx";

const WORDS: Record<InstanceState, string> = {
  planning: "Planning",
  loading: "Loading",
  ready: "Ready",
  waiting: "Waiting",
  failed: "Failed",
};

interface Props {
  instance: Instance;
  swarm: Swarm;
  feed: FeedState;
}

/** One model being served: its state, its layers, the nodes that hold them, and why the plan is what it is. */
export function InstancePanel({ instance, swarm, feed }: Props) {
  const title = `instance-${instance.id}`;
  const layers = layerCount(instance);
  return (
    <section class="panel instance" aria-labelledby={title}>
      <header class="instance-header">
        <h2 id={title}>{instance.model}</h2>
        <p class={`badge state-${instance.state}`}>
          <span class="dot" aria-hidden="true" />
          {WORDS[instance.state]}
        </p>
        <p class="facts">
          <span>epoch {instance.epoch}</span>
          <span>owner {nodeName(swarm, instance.owner)}</span>
          {layers > 0 && <span>{plural(layers, "layer")}</span>}
          {layers > 0 && <span>{plural(instance.stages.length, "stage")}</span>}
        </p>
      </header>
      {instance.reason && <p class={instance.state === "failed" ? "error" : "note"}>{instance.reason}</p>}
      {instance.progress && instance.state !== "ready" && (
        <Progress label="Loading the layers" progress={instance.progress} />
      )}
      {layers > 0 && (
        <>
          <LayerStrip instance={instance} swarm={swarm} colours={feed.colours} />
          <Pipeline instance={instance} swarm={swarm} feed={feed} />
        </>
      )}
      {instance.state === "ready" && <LoadLine instance={instance} />}
      {instance.explanation.length > 0 && (
        <details class="fold">
          <summary>Why this plan</summary>
          <ul>
            {instance.explanation.map((line, index) => (
              <li key={index}>{line}</li>
            ))}
          </ul>
        </details>
      )}
    </section>
  );
}

function LoadLine({ instance: { load } }: { instance: Instance }) {
  const share = Math.round(fraction(load.kv_tokens_used, load.kv_tokens) * 100);
  return (
    <p class="load">
      <span>
        <b>{load.running}</b> running
      </span>
      <span>
        <b>{load.waiting}</b> waiting
      </span>
      <span title={`${load.kv_tokens_used} of ${load.kv_tokens} tokens`}>
        KV cache <b>{share} %</b>
      </span>
    </p>
  );
}
