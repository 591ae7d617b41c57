import { useEffect, useRef, useState } from "preact/hooks";

interface Props {
  /** A key was tried already, and the node did not take it. */
  refused: boolean;
  onKey: (key: string) => void;
  onDismiss: () => void;
}

/** Asks for the API key that this node wants. The browser's own modal dialog holds the focus and closes on Escape. */
export function ApiKeyDialog({ refused, onKey, onDismiss }: Props) {
  const dialog = useRef<HTMLDialogElement>(null);
  const [key, setKey] = useState("");
  useEffect(() => {
    dialog.current?.showModal();
  }, []);
  const submit = (event: Event): void => {
    event.preventDefault();
    if (key.trim()) onKey(key.trim());
  };
  return (
    <dialog ref={dialog} class="dialog" aria-labelledby="key-title" onClose={onDismiss}>
      <form onSubmit={submit}>
        <h2 id="key-title">API key</h2>
        <p>
          This node listens beyond its own machine and asks for the key that it showed at its first start. The key is kept in
          this tab only.
        </p>
        <label class="field">
          Key
          <input
            type="password"
            autocomplete="off"
            spellcheck={false}
            autofocus
            value={key}
            onInput={(event) => setKey(event.currentTarget.value)}
          />
        </label>
        {refused && (
          <p class="error" role="alert">
            The node did not accept that key.
          </p>
        )}
        <button type="submit" class="button button-primary" disabled={!key.trim()}>
          Use this key
        </button>
      </form>
    </dialog>
  );
}
