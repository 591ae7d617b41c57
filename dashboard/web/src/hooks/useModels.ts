import { useEffect, useState } from "preact/hooks";
import { listModels } from "../net/chat.ts";

export interface Models {
  names: string[];
  /** The one to be asked: the user's choice while it is offered, else the first. */
  chosen: string;
  choose: (name: string) => void;
}

/** The models on offer, asked for again whenever `signature` changes. A failure keeps the list: the feed says what is wrong. */
export function useModels(signature: string): Models {
  const [names, setNames] = useState<string[]>([]);
  const [wish, choose] = useState("");
  useEffect(() => {
    const controller = new AbortController();
    listModels(controller.signal).then(setNames, () => undefined);
    return () => controller.abort();
  }, [signature]);
  return { names, chosen: names.includes(wish) ? wish : (names[0] ?? ""), choose };
}
