// A question before something is changed, which says what will happen.
import { useEffect, useRef } from "preact/hooks";

export interface Confirmation {
  title: string;
  what: string;
  action: string;
  run: () => void | Promise<void>;
}

export function Confirm({ asked, onClose }: { asked: Confirmation | null; onClose: () => void }) {
  const dialog = useRef<HTMLDialogElement>(null);
  useEffect(() => {
    if (asked) dialog.current?.showModal();
    else dialog.current?.close();
  }, [asked]);
  return (
    <dialog ref={dialog} aria-labelledby="confirm-title" onClose={onClose}>
      <h2 id="confirm-title">{asked?.title}</h2>
      <p>{asked?.what}</p>
      <div class="actions is-end">
        <button type="button" onClick={onClose}>
          Cancel
        </button>
        <button
          type="button"
          class="primary"
          onClick={() => {
            void asked?.run();
            onClose();
          }}
        >
          {asked?.action}
        </button>
      </div>
    </dialog>
  );
}
