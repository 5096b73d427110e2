/** Keys without a modifier that move in a list; who dictates or types by accident can turn them off. */

const KEY = "powergrad.shortcuts";

class Shortcuts {
  isOn = $state(localStorage.getItem(KEY) !== "off");

  turn(isOn: boolean): void {
    this.isOn = isOn;
    if (isOn) localStorage.removeItem(KEY);
    else localStorage.setItem(KEY, "off");
  }

  /** Does what a key means, unless somebody types or a dialog is open. Arrows are the page's own until the focus is in the list. */
  pressed(event: KeyboardEvent, keys: Record<string, () => void>): void {
    const at = event.target as HTMLElement;
    const does = keys[event.key];
    if (!does || !this.isOn || event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
    if (at.matches("input:not([type=checkbox]), textarea, select, [contenteditable]")) return;
    if (event.key.startsWith("Arrow") && !at.closest("tbody")) return;
    event.preventDefault();
    does();
  }
}

export const shortcuts = new Shortcuts();
