/** A file that stays where it is until this is released. */
export interface Lease {
  readonly file: string;
  /** Safe to call twice. */
  release(): void;
}

/** A lease whose end is `onRelease`, which is called once. */
export function lease(file: string, onRelease: () => void): Lease {
  let held = true;
  const release = () => {
    if (!held) return;
    held = false;
    onRelease();
  };
  return { file, release };
}
