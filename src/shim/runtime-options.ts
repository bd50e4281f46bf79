/** The runtime options of Create. Kiln has none, and somebody who gives some should know. */
import { Options } from '../../gen/containerd/runc_details.ts';
import type { TaskRequest } from './task.ts';

/**
 * The type of the options that are not looked at; undefined where nobody has given any. containerd itself sets those of runc
 * for a container of a sandbox, to its own use: where the sandbox is served.
 */
export function unheededOptions({ options }: Pick<TaskRequest, 'options'>): string | undefined {
  if (options === undefined) return undefined;
  const { typeUrl, value } = options;
  if (/(^|\/)containerd\.runc\.v1\.Options$/.test(typeUrl) && hasOnlyKnown(value)) return undefined;
  return typeUrl;
}

function hasOnlyKnown(value: Buffer): boolean {
  try {
    return Options.encode(Options.decode(value)).finish().length === value.length;
  } catch {
    return false;
  }
}
