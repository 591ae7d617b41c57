import { useState } from "preact/hooks";

/** A command to type, with a button that copies it where the browser allows that (not on plain HTTP beyond loopback). */
export function Command({ text }: { text: string }) {
  const [copied, setCopied] = useState(false);
  const copy = (): void => {
    navigator.clipboard.writeText(text).then(
      () => setCopied(true),
      () => setCopied(false),
    );
  };
  return (
    <span class="command">
      <code>{text}</code>
      {window.isSecureContext && (
        <button type="button" class="button button-quiet" onClick={copy} aria-label={`Copy ${text}`}>
          {copied ? "Copied" : "Copy"}
        </button>
      )}
    </span>
  );
}
