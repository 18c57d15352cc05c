// Attributes of every field that may hold a conversation: a browser's spelling service would send the text elsewhere, and
// its memory of forms would keep it.
export const PRIVATE = { spellcheck: false, autocomplete: "off", autocorrect: "off", autocapitalize: "off" } as const;
