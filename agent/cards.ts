/**
 * The guest's network cards. It has them from its start, but a container without a network must not see any: until the host
 * says what a card is to become, its driver is kept away from it, and then there is no interface.
 * Source: Documentation/ABI/testing/sysfs-bus-… of Linux, "bind" and "unbind" of a driver.
 */
import { spawnSync } from 'node:child_process';
import { existsSync, readdirSync, readFileSync, readlinkSync, writeFileSync } from 'node:fs';
import { basename, join } from 'node:path';
import { AgentError } from './errors.ts';

/** The cards' MACs, which src/vmm/vmm.ts gives them. */
const cardMac = /^02:6b:69:6c:6e:/;

const interfacesDirectory = '/sys/class/net';
const driverDirectory = '/sys/bus/virtio/drivers/virtio_net';

/** Devices of cards that have no driver, by their MACs: "virtio12". */
const hidden = new Map<string, string>();

/** Takes the driver from all cards that are not in use. Where it is not loaded yet, there is nothing to be done. */
export function hideCards(): void {
  if (!existsSync(driverDirectory)) return;
  for (const name of readdirSync(interfacesDirectory)) {
    const mac = readFileSync(join(interfacesDirectory, name, 'address'), 'utf8').trim();
    if (!cardMac.test(mac)) continue;
    const device = basename(readlinkSync(join(interfacesDirectory, name, 'device')));
    writeFileSync(join(driverDirectory, 'unbind'), device);
    hidden.set(mac, device);
  }
}

/** Takes the driver from the card that has become this interface: there is no interface then. */
export function hideCard(name: string, mac: string): void {
  const link = join(interfacesDirectory, name, 'device');
  if (!existsSync(driverDirectory) || !existsSync(link)) return;
  const device = basename(readlinkSync(link));
  writeFileSync(join(driverDirectory, 'unbind'), device);
  hidden.set(mac, device);
}

/**
 * Has a card appear as an interface with its own MAC, if it was kept away until now.
 *
 * @throws AgentError internal when there is no such card
 */
export function showCard(mac: string): void {
  if (!existsSync(driverDirectory)) {
    // A module of the generic kernel, built into the minimal one.
    spawnSync('modprobe', ['virtio_net']);
    hideCards();
  }
  const device = hidden.get(mac);
  if (device === undefined) throw new AgentError('internal', `the guest has no network card with the MAC ${mac}`);
  writeFileSync(join(driverDirectory, 'bind'), device);
  hidden.delete(mac);
}
