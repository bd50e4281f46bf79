/**
 * An emulated guest that does nothing gives back the memory of what QEMU has translated of it, which is most of what its
 * virtual machine has for itself. A plugin of QEMU does it: native/qemu-idle.c. A QEMU that takes no such plugin runs without it.
 */
import { KilnError } from '../../errors.ts';
import type { Logger } from '../../observe/logger.ts';

/** The plugin as it is given to one QEMU. */
export interface IdlePlugin {
  readonly file: string;
  /** How long the guest does nothing before, in seconds. */
  readonly afterS: number;
  /** A file; while it is there, nothing is given back. */
  readonly unless?: string | undefined;
}

/** QEMUs that have refused the plugin, as they are configured. */
const refusing = new Set<string>();

/**
 * Starts QEMU with the plugin, and without it where QEMU refuses it, which is told once.
 *
 * @param start is called once or twice; of the second time's failures nothing is known here
 */
export async function startWithPlugin<T>(
  { qemu, plugin, logger }: { readonly qemu: string; readonly plugin: IdlePlugin | undefined; readonly logger: Logger },
  start: (plugin: IdlePlugin | undefined) => Promise<T>,
): Promise<T> {
  if (plugin === undefined || refusing.has(qemu)) return start(undefined);
  try {
    return await start(plugin);
  } catch (error) {
    if (!isRefusal(error)) throw error;
    refusing.add(qemu);
    logger.warn({ err: error }, 'QEMU takes no plugin of ours: what it has translated is never given back');
    return start(undefined);
  }
}

/** QEMU's words for a plugin that it does not take (plugins/loader.c), and where it is built without (qemu/plugin.h). */
function isRefusal(error: unknown): boolean {
  return error instanceof KilnError && /Could not load plugin|plugin interface not enabled/.test(error.message);
}
